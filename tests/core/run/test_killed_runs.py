"""SIGKILL at random moments of a whole run: it resumes every time, and its files end up equal to an undisturbed run's.

A life is one start of `detection_train.py --resume` until it ends or is killed. A run has as many lives as it needs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from core.run.experiment import GRAPH_FILE
from core.weights.checkpoint import STATE_SUFFIX, WEIGHTS_SUFFIX, latest
from tests.small_config import DEMO, SMALL_TRAINING
from utils.make_demo_dataset import make_demo_dataset

ROOT = Path(__file__).parents[3]
END_EPOCH = 3
SMALL = [
    *SMALL_TRAINING,
    "General.batch_image=2",
    "General.log_frequency=1",
    "General.keep_checkpoints=2",
    f"OptimizeParam.schedule.end_epoch={END_EPOCH}",
]
KILLS = 50
LEAST = 10  # kills of each phase: a test without kills, or with all at the same moment, must not pass
MOST = 100  # kills within which each phase must have its least number
PHASES = ("starting", "training", "writing")
DEADLINE = 300.0  # seconds of a life
MINUTES = (0.0001, 0.0001, 0.002)  # General.checkpoint_minutes of a life: after every step, or after about every third
CURVES = ("step", "epoch", "lr", "cls_loss", "reg_loss", "fg_acc", "grad_norm")

# One process imports the slow modules and then forks a life for every line that it reads. It computes nothing:
# a backward pass or a thread before the fork would break those of the lives. It takes a life's number back only when
# it is asked how the life ended: until then no other process can have that number.
NURSERY = """
import json, os, sys, traceback
import torch, torch._dynamo
import core.detection_module, core.distributed.launch, core.engine.engine, detection_train
torch.set_num_threads(1)
for line in iter(sys.stdin.readline, ""):
    output, arguments = json.loads(line)
    life = os.fork()
    if life == 0:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = 1
        try:
            status = detection_train.main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(life, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(life, 0)[1]), flush=True)
"""


@dataclass
class Life:
    process: int
    output: Path
    nursery: tuple[IO[str], IO[str]]  # requests to the server and its answers

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def steps(self) -> int:
        return sum(line.startswith("epoch ") for line in self.said().splitlines())

    def end(self) -> int:
        """Return its exit status, or minus the signal that killed it."""
        ask, answers = self.nursery
        print("end", file=ask, flush=True)
        return int(answers.readline())

    def is_over(self) -> bool:
        return Path(f"/proc/{self.process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Life]]:
    """Start lives of the run in a folder: 9 images twice, 2 per step, 27 steps."""
    root = tmp_path_factory.mktemp("killed")
    make_demo_dataset(root / "data" / "demo", train=9, val=1, size=128, seed=3)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NECKLACE_CACHE": str(root / "cache")}
    pipes: dict[str, Any] = {"text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", NURSERY], cwd=ROOT, env=os.environ | environment, **pipes) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        stdin, stdout = nursery.stdin, nursery.stdout

        def start_life(folder: Path, output: Path, *overrides: str) -> Life:
            places = [f"General.output_root={folder}", "General.name=run", f"DatasetParam.data_root={root / 'data'}"]
            sets = [word for override in [*SMALL, *places, *overrides] for word in ("--set", override)]
            arguments = ["--config", str(DEMO), "--gpus", "cpu", "--resume", *sets]
            print(json.dumps([str(output), arguments]), file=stdin, flush=True)
            return Life(int(stdout.readline()), output, (stdin, stdout))

        yield start_life
        stdin.close()


@dataclass
class Whole:
    """An uninterrupted run."""

    files: dict[str, bytes]
    curves: list[tuple[Any, ...]]
    start_seconds: float  # until the end of the first step
    step_seconds: float


@pytest.fixture(scope="module")
def whole(start: Callable[..., Life], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    life = start(folder, folder / "output")
    started = time.monotonic()
    wait_for(lambda: life.steps() > 0, life)
    first = time.monotonic()
    assert life.end() == 0, life.said()
    step_seconds = (time.monotonic() - first) / (life.steps() - 1)
    return Whole(files_of(folder / "run"), curves_of(folder / "run"), first - started, step_seconds)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*checkpoint*")}


def curves_of(folder: Path) -> list[tuple[Any, ...]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [tuple(record[name] for name in CURVES) for record in records]


def wait_for(met: Callable[[], bool], life: Life, pause: float = 0.005) -> None:
    """Wait until the condition is met, or the life is over."""
    deadline = time.monotonic() + DEADLINE
    while not met() and not life.is_over():
        assert time.monotonic() < deadline, life.said()
        time.sleep(pause)


def unfinished(folder: Path) -> set[tuple[str, int]]:
    """Return the files of a checkpoint that is being written: temporary ones, and a state without its weights yet."""
    found = set()
    for path in list(folder.glob(".checkpoint-*.tmp")) + list(folder.glob(f"*{STATE_SUFFIX}")):
        weights = path.with_name(path.name.removesuffix(STATE_SUFFIX) + WEIGHTS_SUFFIX)
        try:
            if path.suffix == ".tmp" or not weights.exists():
                found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def wait_for_moment(life: Life, folder: Path, wanted: str, whole: Whole, chance: random.Random) -> None:
    if wanted == "starting":
        time.sleep(chance.uniform(0, whole.start_seconds))
        return
    steps = chance.randint(2, 10)
    wait_for(lambda: life.steps() >= steps, life)
    if wanted == "training":
        time.sleep(chance.uniform(0, whole.step_seconds))
        return
    before = unfinished(folder)
    wait_for(lambda: bool(unfinished(folder) - before), life, pause=0.0002)
    time.sleep(chance.choice((0, chance.uniform(0, 0.004))))


def phase_of(life: Life, folder: Path, before: set[tuple[str, int]]) -> str:
    """Return the phase in which the life was killed."""
    if unfinished(folder) - before:
        return "writing"
    return "training" if life.steps() else "starting"


def step_of(folder: Path) -> int:
    """Return the step of the newest checkpoint; 0 without one."""
    newest = latest(folder) if folder.exists() else None
    return newest.progress.step if newest else 0


def lives_until_killed(
    start: Callable[..., Life], root: Path, name: str, whole: Whole, kills: Counter[str], chance: random.Random
) -> Path:
    """The folder of a run that ended, or had a life left when there were kills enough; `kills` is counted on."""
    folder, worker = root / name / "run", chance.choice((0, 0, 0, 1))
    folder.parent.mkdir()
    while True:
        before, step = unfinished(folder), step_of(folder)
        enough = kills.total() >= KILLS and all(kills[phase] >= LEAST for phase in PHASES)
        lacking = [phase for phase in PHASES if kills[phase] < LEAST] if kills.total() >= KILLS else PHASES
        output = root / name / f"life{kills.total()}"
        minutes = f"General.checkpoint_minutes={chance.choice(MINUTES)}"
        life = start(folder.parent, output, f"General.loader_worker={worker}", minutes)
        if not enough:
            wait_for_moment(life, folder, chance.choice(lacking), whole, chance)
            if not life.is_over():
                os.kill(life.process, signal.SIGKILL)
        status = life.end()
        assert status in (0, -signal.SIGKILL), life.said()
        resumed = [line for line in life.said().splitlines() if line.startswith("resuming ")]
        assert not resumed or resumed[0].endswith(f" step {step}")
        assert step_of(folder) >= step, "a checkpoint was lost"
        if status == 0:
            return folder
        kills[phase_of(life, folder, before)] += 1
        assert kills.total() < MOST


def test_a_run_that_is_killed_fifty_times_ends_in_the_same_bytes(
    start: Callable[..., Life], whole: Whole, tmp_path: Path
) -> None:
    assert set(whole.files) == {
        f"checkpoint-{epoch:04d}{suffix}"
        for epoch, suffix in ((2, WEIGHTS_SUFFIX), (END_EPOCH, WEIGHTS_SUFFIX), (END_EPOCH, STATE_SUFFIX))
    } | {GRAPH_FILE}
    chance, kills, runs = random.Random(5), Counter[str](), 0
    while kills.total() < KILLS or min(kills[phase] for phase in PHASES) < LEAST:
        folder = lives_until_killed(start, tmp_path, f"run{runs}", whole, kills, chance)
        runs += 1
        assert files_of(folder) == whole.files, f"run {runs}, {kills}"
        assert curves_of(folder) == whole.curves
    assert runs > 1
