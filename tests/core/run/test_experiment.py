"""The folder of an experiment: one run at a time, and writable."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core.run.experiment import LOCK_FILE, lock_experiment

REPOSITORY = Path(__file__).parents[3]
HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from core.run.experiment import lock_experiment
with lock_experiment(Path(sys.argv[1])):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))  # as the loader's are
    worker.start()
    print(worker.pid, flush=True)
    sys.stdin.read()
    worker.kill()
"""


@contextmanager
def another_run(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a process that holds the lock of `folder`; yields it and the process id of its worker."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        try:
            yield process, worker
        finally:
            process.kill()
            os.kill(worker, 9)


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    with another_run(folder) as (process, worker):
        with (
            pytest.raises(ValueError, match=rf"demo is in use: process {process.pid} on \S+ trains") as caught,
            lock_experiment(folder),
        ):
            pass
        assert "General.name=" in str(caught.value)
        with lock_experiment(tmp_path / "other") as notes:  # another folder is free
            assert notes == []
        process.kill()
        process.wait()
        os.kill(worker, 0)  # the worker still runs and holds no lock
        with lock_experiment(folder) as notes:
            assert notes == []


def test_a_run_that_ends_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_experiment(tmp_path):
        raise KeyError
    with lock_experiment(tmp_path):
        pass
    assert os.listdir(tmp_path) == [LOCK_FILE]
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_a_file_system_without_locks_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_lock)
    with lock_experiment(tmp_path) as notes:
        assert len(notes) == 1
        assert "cannot be locked (No locks available)" in notes[0]


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"cannot write into .*file/demo: Not a directory.*General\.output_root"
    with pytest.raises(OSError, match=message), lock_experiment(tmp_path / "file" / "demo"):
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", read_only)
    message = rf"cannot write into {tmp_path}: {os.strerror(number)}.*make it writable"
    with pytest.raises(OSError, match=message), lock_experiment(tmp_path):
        pass


def test_a_full_disk_is_reported_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = rf"cannot write into {tmp_path}: No space left on device. Free space"
    with pytest.raises(OSError, match=message), lock_experiment(tmp_path):
        pytest.fail("the run started")
    assert os.listdir(tmp_path) == [LOCK_FILE]
    monkeypatch.undo()
    with lock_experiment(tmp_path):  # the lock is released after the error
        pass
    assert os.listdir(tmp_path) == [LOCK_FILE]
