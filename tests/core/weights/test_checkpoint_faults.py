"""Interrupted writing of checkpoints: a complete pair is in the folder afterwards."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from core.weights.checkpoint import Progress, epoch_stem, latest, load_weights, read_tensors, save_checkpoint, step_stem

REPOSITORY = Path(__file__).parents[3]
STEPS = 3  # per epoch
KILLS = 50


def save(folder: Path, step: int, keep: int = 2) -> None:
    """Save the pair of a run of three steps per epoch; every tensor is filled with its step's number."""
    epoch, inside = divmod(step, STEPS)
    stem = step_stem(step) if inside else epoch_stem(epoch)
    progress = Progress(epoch=epoch, step=step, seed=0, experiment="demo")
    weights, state = torch.full((64, 64), float(step)), torch.full((64, 64), -float(step))
    save_checkpoint(folder, stem, {"weight": weights}, {"momentum": state}, progress, keep)


def newest_step(folder: Path) -> int:
    """Return the step of the newest pair, of which both files must be complete and of that step; 0 without one."""
    pair = latest(folder)
    if pair is None:
        return 0
    weights, progress = load_weights(pair.weights)
    assert progress == pair.progress
    assert torch.equal(weights["weight"], torch.full((64, 64), float(progress.step)))
    assert torch.equal(read_tensors(pair.state)["momentum"], torch.full((64, 64), -float(progress.step)))
    return progress.step


class FailingDisk:
    """Count the calls to the file system; `length` calls fail, starting with number `fails_from`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_from: int, length: float, error: int) -> None:
        self.calls: list[str] = []
        self._failing = range(fails_from, 10**6 if length == float("inf") else fails_from + int(length))
        self._error = error
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        open_file = Path.open

        def open_counted(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
            if "w" not in mode:
                return open_file(path, mode, *args, **kwargs)
            handle = self._wrapped("open", open_file)(path, mode, *args, **kwargs)
            return self._counted_file(handle)

        monkeypatch.setattr(Path, "open", open_counted)

    def _wrapped(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 in self._failing:
                raise OSError(self._error, os.strerror(self._error))
            return function(*args, **kwargs)

        return call

    def _counted_file(self, handle: IO[Any]) -> IO[Any]:
        write, disk = handle.write, self

        class File:
            """A file whose `write` stores half of the bytes before it fails, as on a disk that fills up."""

            def __enter__(self) -> File:
                return self

            def __exit__(self, *_: object) -> None:
                handle.close()

            def write(self, content: bytes) -> int:
                half = len(content) // 2
                write(content[:half])
                return half + disk._wrapped("write", write)(content[half:])

            def flush(self) -> None:
                disk._wrapped("flush", handle.flush)()

            def fileno(self) -> int:
                return handle.fileno()

        return File()  # type: ignore[return-value]


def fault_points() -> Iterator[Any]:
    # two files: open, write, flush, fsync, rename, sync of the folder
    for error in (errno.ENOSPC, errno.EROFS):
        for length in (1, float("inf")):
            for call in range(12):
                yield pytest.param(error, length, call, id=f"{errno.errorcode[error]}-{length}-{call}")


@pytest.mark.parametrize("error, length, call", list(fault_points()))
@pytest.mark.parametrize("step", [2, 3])
def test_every_call_that_fails_leaves_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, length: float, call: int, step: int
) -> None:
    """The disk fails for one call, or for all from one call on: `step` may be lost, the one before it must not be."""
    for earlier in range(1, step):
        save(tmp_path, earlier)
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, call, length, error)
        with pytest.raises(OSError, match=re.escape(os.strerror(error))) as caught:
            save(tmp_path, step)
        assert len(disk.calls) > call
    assert caught.value.errno == error
    assert "Free space or make the folder writable" in str(caught.value)
    is_renamed = call == 11  # only the sync of the folder failed after the second rename
    assert newest_step(tmp_path) == (step if is_renamed else step - 1)
    assert not list(tmp_path.glob(".*.tmp"))
    save(tmp_path, step)
    save(tmp_path, step + 1)
    assert newest_step(tmp_path) == step + 1


def test_the_calls_of_a_save_are_those_that_fail_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, 10**6, 1, errno.ENOSPC)
        save(tmp_path, 1)
    assert sorted(disk.calls) == sorted(2 * ["open", "write", "flush", "fsync", "replace", "fsync"])


# One process imports torch and forks a writer per line that it reads, since 50 imports would take minutes.
NURSERY = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_checkpoint_faults import write_on
for line in sys.stdin:
    writer = os.fork()
    if writer == 0:
        write_on(Path(sys.argv[1]), int(line))
    print(writer, flush=True)
    os.waitpid(writer, 0)
    print("gone", flush=True)
"""


def write_on(folder: Path, step: int) -> None:
    """Save one step after the other, each noted in a journal, until killed."""
    journal = os.open(folder / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in count(step + 1):
        save(folder, number)
        os.write(journal, f"{number}\n".encode())


def done_steps(folder: Path) -> int:
    journal = folder / "journal"
    lines = journal.read_text().split() if journal.exists() else []
    return int(lines[-1]) if lines else 0


def test_kill_at_random_moments_leaves_the_last_pair_or_the_one_before(tmp_path: Path) -> None:
    moments = random.Random(5)
    unsaid = 0  # kills between the renames that complete a pair and the journal's line
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(tmp_path), str(Path(__file__).parent)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for _ in range(KILLS):
            before = newest_step(tmp_path)
            print(before, file=nursery.stdin, flush=True)
            writer = int(nursery.stdout.readline())
            time.sleep(moments.uniform(0.0, 0.1))
            os.kill(writer, signal.SIGKILL)
            assert nursery.stdout.readline() == "gone\n"
            step, done = newest_step(tmp_path), max(before, done_steps(tmp_path))
            assert step in (done, done + 1)
            unsaid += step != done
        nursery.stdin.close()
    assert newest_step(tmp_path) > KILLS // 2  # checkpoints were written between the kills
    assert unsaid < KILLS
    left = [path.name for path in tmp_path.iterdir() if "step" not in path.name and path.name != "journal"]
    assert len(left) <= 2 * 2 + 3  # two epochs' weights, a third pair, and the files that the last kill interrupted
