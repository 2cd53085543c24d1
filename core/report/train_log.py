"""Log of a training run: lines and a progress bar on the terminal, log.txt and log.jsonl beside the checkpoints."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from core.run.atomic_file import atomic_file

LOG_LINES = "log.jsonl"
LOG_TEXT = "log.txt"


class TrainLog:
    """Log files of a run, opened as a context.

    Records after `start_epoch` (None: that of `start_step`), from a run that was interrupted after its last checkpoint,
    are removed on opening. Epochs are compared, since step numbers change with the global batch size.
    """

    def __init__(
        self, folder: Path, start_step: int, end_step: int, iter_per_epoch: int, start_epoch: float | None = None
    ) -> None:
        self.end_step = end_step
        self.iter_per_epoch = iter_per_epoch
        start_epoch = start_step / iter_per_epoch if start_epoch is None else start_epoch
        kept = _drop_records_after(folder / LOG_LINES, start_epoch)
        self.evaluated = {record["epoch"] for record in kept if record.get("event") in ("eval", "tested")}  # epochs
        mode = "a" if start_step else "w"
        self._text = (folder / LOG_TEXT).open(mode, buffering=1, encoding="utf-8")
        self._lines = (folder / LOG_LINES).open("a", buffering=1, encoding="utf-8")
        self._bar = tqdm(total=end_step, initial=start_step, unit="step", disable=not sys.stderr.isatty())
        self._since = self._start = time.perf_counter()
        self._start_step = self._step = start_step
        self._waited = 0.0
        self._waiting_first = True

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._text.close()
        self._lines.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data.

        The first wait includes the start of the workers, before any step: the log's speeds are measured from its end.
        """
        start = time.perf_counter()
        yield
        if self._waiting_first:
            self._waiting_first = False
            self.restart_clock()
        else:
            self._waited += time.perf_counter() - start

    def restart_clock(self) -> None:
        """Exclude the time since the last step from the log's speeds."""
        now = time.perf_counter()
        self._start += now - self._since
        self._since = now

    def info(self, text: str) -> None:
        """Write a line of text to the terminal and log.txt."""
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def event(self, name: str, **values: Any) -> None:
        """Write a record to log.jsonl."""
        self._lines.write(json.dumps({"event": name, **values}) + "\n")

    def steps(self, step: int, num_image: int, values: dict[str, float]) -> None:
        """Log the state after `step` updates; `values` and `num_image` cover those since the last call."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        record = {
            "step": step,
            "epoch": round(step / self.iter_per_epoch, 7),
            **values,
            "img_per_s": num_image / elapsed,
            "data_wait": self._waited / elapsed,
            "eta_s": (now - self._start) / (step - self._start_step) * (self.end_step - step),
        }
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._lines.write(json.dumps(finite, allow_nan=False) + "\n")
        self.info(_line(record, self.end_step))
        self._bar.update(step - self._step)
        self._step, self._waited, self._since = step, 0.0, now


def append_event(folder: Path, name: str, **values: Any) -> None:
    """Append a record to the log of the run in `folder`; does nothing if no run has a log there."""
    path = folder / LOG_LINES
    if path.is_file():
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"event": name, **values}) + "\n")


def best_scores(folder: Path) -> dict[str, Any] | None:
    """Return the evaluation with the highest AP in the log of the run in `folder`; None if there is none."""
    path = folder / LOG_LINES
    records = _read_records(path) if path.is_file() else []
    evaluations = [one for one in records if one.get("event") == "eval"]
    return max(evaluations, key=lambda one: one["AP"], default=None)


class NoLog:
    """A log that writes nothing, for all but the main process."""

    evaluated: frozenset[int] = frozenset()

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def restart_clock(self) -> None:
        pass

    def info(self, text: str) -> None:
        pass

    def event(self, name: str, **values: Any) -> None:
        pass

    def steps(self, step: int, num_image: int, values: dict[str, float]) -> None:
        pass


_FORMATS = {
    "lr": ".5f",
    "grad_norm": ".2f",
    "loss_scale": "g",
    "skipped": ".0f",
    "memory_mib": ".0f",
    "img_per_s": ".1f",
    "data_wait": ".0%",
}


def _line(record: dict[str, Any], end_step: int) -> str:
    left = time.strftime("%H:%M:%S", time.gmtime(record["eta_s"] % 86400))
    days = f"{int(record['eta_s'] // 86400)}d " if record["eta_s"] >= 86400 else ""
    numbers = [
        f"{name} {value:{_FORMATS.get(name, '.4f')}}" if math.isfinite(value) else f"{name} -"
        for name, value in record.items()
        if name not in ("step", "epoch", "eta_s")
    ]
    return f"epoch {record['epoch']:.2f} step {record['step']}/{end_step} {' '.join(numbers)} left {days}{left}"


def _drop_records_after(path: Path, epoch: float) -> list[dict[str, Any]]:
    """Remove later records from the file; returns those that are kept."""
    if not path.exists():
        return []
    kept = [record for record in _read_records(path) if 0 < epoch >= record.get("epoch", 0) - 1e-7]
    with atomic_file(path) as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in kept)
    return kept


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log; an incomplete line, the last one of a run that was killed, is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records
