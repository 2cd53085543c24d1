"""Atomic writing of files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from core.run.atomic_file import atomic_file, temporary_path


def test_the_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_file(path) as handle:
        handle.write(b"half")
        assert not path.exists()
        handle.write(b"whole")
    assert path.read_bytes() == b"halfwhole"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()], ids=repr)
def test_a_failure_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_file(path) as handle:
            handle.write(b"ne")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)

    def write() -> None:
        with atomic_file(path) as handle:
            handle.write(b"new")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_temporary_file_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    temporary_path(path).write_bytes(b"a long rest of a process that was killed")
    with atomic_file(path) as handle:
        handle.write(b"new")
    assert path.read_bytes() == b"new"
