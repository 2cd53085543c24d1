"""Atomic writing of files: a file appears complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_path(path: Path) -> Path:
    """Return the path to write to until the file is complete, in the same folder: a rename stays on its file system."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes. A reader sees the old file or the complete new one, even after a crash.

    The folder is created if it does not exist. If the block or the disk fails, the temporary file is removed, a file
    that was at `path` before is unchanged and the exception propagates.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())  # a full disk may show only here
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)  # the rename is durable after an fsync of the folder
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
