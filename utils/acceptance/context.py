"""The surroundings of a stage: its device and its time, and the lines that it writes as it goes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
FIGURES = "figures.jsonl"  # beside the results: every line of every stage, written at once


@dataclass(frozen=True)
class Context:
    """A stage's device, folders and deadline. What it measures and checks is appended to FIGURES line by line, so that
    a stage which is stopped in the middle keeps what it had."""

    stage: int
    device: torch.device
    out: Path  # the results' folder
    work: Path  # scratch, shared by the stages of a run
    deadline: float  # of time.monotonic
    failures: list[str] = field(default_factory=list)

    @property
    def small(self) -> bool:
        """Everything in small: there is no GPU."""
        return self.device.type == "cpu"

    @property
    def time_left(self) -> float:
        """Seconds until the stage is stopped."""
        return self.deadline - time.monotonic()

    def record(self, kind: str, **values: Any) -> None:
        """Append a row to the table `kind` of this stage."""
        line = json.dumps({"stage": self.stage, "kind": kind, **rounded(values)})
        with (self.out / FIGURES).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def check(self, what: str, holds: bool, **values: Any) -> None:
        """Record whether a requirement holds; one that does not makes the stage fail at its end."""
        self.record("checks", what=what, holds=bool(holds), **values)
        if not holds:
            self.failures.append(what)

    def skip(self, what: str, reason: str) -> None:
        """Record that something cannot run here: that is not a pass."""
        self.record("not on this device", what=what, reason=reason)

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Do a part of the stage; an exception fails this part alone."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.check(what, False, error=f"{type(error).__name__}: {error}"[-600:])

    def run(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, share: float = 1.0
    ) -> tuple[int | None, str]:
        """Run a command from the root within a share of the time left: its exit status (None: it ran out) and what it
        printed."""
        limit = max(1.0, share * self.time_left - 2)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        variables = child_environment(environment or {})
        try:
            done = subprocess.run([*command], cwd=ROOT, env=variables, timeout=limit, **pipes)
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or b""
            return None, printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        return done.returncode, done.stdout


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that imports from the root."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **changes}


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def rounded(value: Any) -> Any:
    """Values for JSON, floats in four digits and finite."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def wait(device: torch.device) -> None:
    """Return when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_each(device: torch.device, work: Callable[[], object], repeats: int, warmup: int = 2) -> float:
    """Seconds of one of `repeats` runs back to back, without a wait for the device between them."""
    for _ in range(warmup):
        work()
    wait(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats


def set_tf32(on: bool) -> None:
    """Let float32 convolutions and matrix products of a GPU use TF32, or compute them in IEEE float32."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if on else "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"
