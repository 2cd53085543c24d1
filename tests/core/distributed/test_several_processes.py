"""Training in two processes on the CPU, by the user's command: stopped, killed and stalled processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_config import DEMO, SMALL_TRAINING
from utils.make_demo_dataset import make_demo_dataset

ROOT = Path(__file__).parents[3]
SMALL = [
    *SMALL_TRAINING,
    "General.batch_image=2",
    "OptimizeParam.schedule.end_epoch=4",
    "OptimizeParam.schedule.lr_epoch=3",
]
TIMEOUT = 300


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_demo_dataset(root / "demo", train=9, val=4, size=128, seed=3)
    return root


@pytest.fixture(scope="module")
def start(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """Start a training of 20 steps: 9 images twice, 4 per step. The folder of all runs is `start.root`."""
    root = tmp_path_factory.mktemp("runs")

    def start(
        name: str, *overrides: str, processes: int = 2, resume: bool = False, **environ: str
    ) -> subprocess.Popen[str]:
        places = [f"General.output_root={root / name}", "General.name=run", f"DatasetParam.data_root={data_root}"]
        sets = [word for override in [*SMALL, *places, *overrides] for word in ("--set", override)]
        command = [sys.executable, "detection_train.py", "--config", str(DEMO), "--gpus", "cpu", *sets]
        command += ["--processes", str(processes)] + ["--resume"] * resume
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NECKLACE_CACHE": str(root / "cache")} | environ
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload,no-any-return]

    start.root = root  # type: ignore[attr-defined]
    return start


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def whole(start: Callable[..., subprocess.Popen[str]]) -> Path:
    """Return the folder of an uninterrupted run."""
    finish(start("whole"))
    return start.root / "whole" / "run"  # type: ignore[attr-defined]


def last(folder: Path) -> tuple[bytes, bytes]:
    """Return the final weights and momentum."""
    return tuple((folder / f"checkpoint-0004{part}.safetensors").read_bytes() for part in ("", ".state"))  # type: ignore[return-value]


def workers(process: subprocess.Popen[str]) -> dict[int, int]:
    """Return the process ids of the launcher's processes, by rank."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = [v.removeprefix(b"RANK=") for v in variables if v.startswith(b"RANK=")]
        if rank:
            found[int(rank[0])] = int(child)
    return found


def wait_for_step(folder: Path, step: int) -> None:
    """Wait until the log has this step."""
    deadline = time.monotonic() + TIMEOUT
    log = folder / "log.jsonl"
    while not log.exists() or f'"step": {step},' not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_bytes(
    start: Callable[..., subprocess.Popen[str]], whole: Path, number: signal.Signals
) -> None:
    process = start(f"stopped{number}")
    folder = start.root / f"stopped{number}" / "run"  # type: ignore[attr-defined]
    wait_for_step(folder, 6)
    process.send_signal(number)
    finish(process, status=128 + number)
    assert list(folder.glob("checkpoint-step*.safetensors")), "it stopped in the middle of an epoch"
    finish(start(f"stopped{number}", resume=True))
    assert last(folder) == last(whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_replaced(start: Callable[..., subprocess.Popen[str]], whole: Path, rank: int) -> None:
    process = start(f"killed{rank}")
    folder = start.root / f"killed{rank}" / "run"  # type: ignore[attr-defined]
    wait_for_step(folder, 8)
    os.kill(workers(process)[rank], signal.SIGKILL)
    output = finish(process)
    assert f"rank {rank} was killed by signal 9" in output
    assert "restarting all from the newest checkpoint" in output
    assert last(folder) == last(whole)


def test_a_stalled_process_is_named_and_replaced(start: Callable[..., subprocess.Popen[str]], whole: Path) -> None:
    process = start("stalled", NECKLACE_TIMEOUT="10", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3")
    folder = start.root / "stalled" / "run"  # type: ignore[attr-defined]
    wait_for_step(folder, 8)
    os.kill(workers(process)[1], signal.SIGSTOP)
    output = finish(process)
    assert "rank 1 was last: " in output
    assert "step " in output.split("rank 1 was last: ")[1].splitlines()[0]
    assert last(folder) == last(whole)


def test_a_number_of_processes_that_does_not_match_the_config(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("wrong", RANK="0", WORLD_SIZE="3", LOCAL_RANK="0")
    assert "the launcher started 3 processes, and the config is for 2 devices" in finish(process, status=1)
