"""The stages of the acceptance, and running them: one process after the other, each within its own time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from utils.acceptance.context import FIGURES, ROOT, child_environment, python, rounded

RESULTS = "results.jsonl"
OUTPUT = "output.txt"  # what the stages print
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
NO_TIME, NOT_HERE = "no time left", "not on this device"
LEAST = 3.0  # seconds; a stage that has less is not started
GRACE = 5.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Stage:
    """A module with `run(context)`, started as a process of its own.

    What a stage leaves of its seconds goes to those after it. While a `timed` stage runs nothing else does: what
    another stage has started ahead is stopped for so long.
    """

    number: int
    name: str
    seconds: float  # of a budget of BUDGET
    module: str
    timed: bool = False
    ahead: str | None = None  # a module of which `run` is started early, beside the stages that time nothing


BUDGET = 540.0
STAGES = (
    Stage(0, "the machine", 20, "utils.acceptance.stage.machine", timed=True),
    Stage(1, "kernels built and loaded", 70, "utils.acceptance.stage.kernels"),
    Stage(2, "the operators' tests", 75, "utils.acceptance.stage.operator_tests"),
    Stage(3, "the device against the CPU", 75, "utils.acceptance.parity.networks"),
    Stage(4, "training steps", 110, "utils.acceptance.stage.speed", timed=True),
    Stage(5, "profile of a step", 25, "utils.acceptance.stage.profile_step", timed=True),
    Stage(6, "options for speed", 45, "utils.acceptance.stage.options", timed=True),
    Stage(7, "convolutions alone", 20, "utils.acceptance.stage.floor", timed=True),
    Stage(8, "operators alone", 35, "utils.acceptance.stage.operators", timed=True),
    Stage(9, "the demo", 65, "utils.acceptance.stage.demo", ahead="utils.acceptance.stage.demo_on_cpu"),
)


def run_stages(stages: Sequence[Stage], out: Path, work: Path, device: str, budget: float) -> list[dict[str, Any]]:
    """Run the stages in order and append a line of results for each when it ends; returns the lines.

    A stage that fails or runs out does not stop the next.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    scale = budget / sum(stage.seconds for stage in stages)
    lines, ahead = [], _Ahead(stages, out, work, device, end)
    with (out / OUTPUT).open("a", encoding="utf-8") as output:
        for position, stage in enumerate(stages):
            kept = scale * sum(later.seconds for later in stages[position + 1 :])
            limit = end - time.monotonic() - kept
            ahead.before(stage, output)
            lines.append(_run_stage(stage, out, work, device, limit, output))
            with (out / RESULTS).open("a", encoding="utf-8") as results:
                results.write(json.dumps(lines[-1]) + "\n")
            print(_row(lines[-1]), flush=True)
        ahead.stop()
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines of results as text."""
    return "\n".join(_row(line) for line in lines)


def _row(line: dict[str, Any]) -> str:
    note = line["error"].strip().splitlines()[-1][:100] if line["error"].strip() else ""
    return f"{line['stage']:>2}  {line['name']:<28} {line['status']:<19} {line['seconds']:6.1f} s  {note}".rstrip()


def _run_stage(stage: Stage, out: Path, work: Path, device: str, limit: float, output: IO[str]) -> dict[str, Any]:
    line: dict[str, Any] = {"stage": stage.number, "name": stage.name, "limit": round(limit, 1), "seconds": 0.0}
    if limit < LEAST:
        return {**line, "status": NO_TIME, "error": "", "figures": []}
    figures, before = out / FIGURES, _size(out / FIGURES)
    printed = output.tell()
    output.write(f"=== stage {stage.number}: {stage.name}\n")
    output.flush()
    began = time.monotonic()
    process = _start(stage.module, stage.number, out, work, device, began + limit, output)
    try:
        status = PASSED if process.wait(timeout=limit) == 0 else FAILED
    except subprocess.TimeoutExpired:
        status = TIMED_OUT
    _end(process)
    rows = _rows(figures, before, stage.number)
    if status == PASSED and all(row["kind"] == NOT_HERE for row in rows):
        status = NOT_HERE
    error = _tail(out / OUTPUT, printed) if status in (FAILED, TIMED_OUT) else ""
    seconds = round(time.monotonic() - began, 1)
    return {**line, "status": status, "seconds": seconds, "error": error, "figures": rows}


def _start(
    module: str, number: int, out: Path, work: Path, device: str, deadline: float, output: IO[str]
) -> subprocess.Popen[bytes]:
    folders = ["--out", str(out.resolve()), "--work", str(work.resolve())]
    arguments = ["--stage", str(number), "--device", device, "--deadline", f"{deadline:.1f}", *folders]
    # its own session: all of its processes are stopped together
    return subprocess.Popen(
        python("-m", "utils.acceptance", module, *arguments),
        cwd=ROOT,
        env=child_environment({}),
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop what is left of the process's session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=GRACE)
        except ProcessLookupError:  # nothing is left
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


class _Ahead:
    """The part of a later stage that is started beside the stages that time nothing."""

    def __init__(self, stages: Sequence[Stage], out: Path, work: Path, device: str, end: float) -> None:
        self._stage = next((stage for stage in stages if stage.ahead is not None), None)
        self._place = (out, work, device)
        self._end = end
        self._process: subprocess.Popen[bytes] | None = None

    def before(self, stage: Stage, output: IO[str]) -> None:
        """Start, stop or let go on, as the stage that comes next allows. The kernels are built first."""
        if self._stage is None or self._stage.ahead is None or stage.number < 2:
            return
        if self._process is None and not stage.timed:
            out, work, device = self._place
            place = (self._stage.ahead, self._stage.number, out, work, device)
            self._process = _start(*place, self._end, output)
        elif self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGSTOP if stage.timed else signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGCONT)
            _end(self._process)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _rows(path: Path, start: int, number: int) -> list[dict[str, Any]]:
    """The figures that a stage has appended since; a line that was cut off is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(start)
        lines = [line for line in file.read().split(b"\n")[:-1] if line]
    rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if key != "stage"} for row in rows if row["stage"] == number]


def _tail(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read()[-1500:].decode(errors="replace")


def describe_environment(device: str) -> dict[str, Any]:
    """The versions, the card and the driver, asked in a process of its own: this one keeps off the GPU."""
    command = python("-m", "utils.acceptance.environment", device)
    done = subprocess.run(command, cwd=ROOT, env=child_environment({}), capture_output=True, text=True, timeout=120)
    if done.returncode:
        return {"device": device, "error": done.stderr[-1000:]}
    found: dict[str, Any] = rounded(json.loads(done.stdout.strip().splitlines()[-1]))
    return found
