"""The folder of a run, `<output_root>/<name>`: may this run start here, and from where."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from core.run.atomic_file import atomic_file
from core.weights.checkpoint import Checkpoint, latest

if TYPE_CHECKING:
    from config.schema import Config

CONFIG_FILE = "config.txt"
LOCK_FILE = ".lock"
PROBE_FILE = "probe"
PROBE_BYTES = 1 << 16  # more than the log and the config need at once
_HELD = (errno.EAGAIN, errno.EACCES)  # what systems answer for a lock of another process


def experiment_folder(config: Config) -> Path:
    return Path(config.TestParam.model.prefix).parent


def find_start(config: Config, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from, perhaps the last one; None for the first step. Nothing is written.

    Raises ValueError where the folder holds a run that `resume` does not ask for.
    """
    folder = experiment_folder(config)
    newest = latest(folder) if folder.is_dir() else None
    if newest is None:
        return None
    end_epoch = config.OptimizeParam.schedule.end_epoch
    anew = "train under another name (--set General.name=...) or remove the folder"
    if not resume and newest.is_finished(end_epoch):
        raise ValueError(
            f"{folder} holds a finished run ({newest.progress.epoch} epochs): {anew}; to train on, add --resume and "
            "a larger OptimizeParam.schedule.end_epoch"
        )
    if not resume:
        raise ValueError(
            f"{folder} holds a run that is not finished (epoch {newest.progress.epoch} of {end_epoch}, step "
            f"{newest.progress.step}): add --resume to go on with it, {anew}"
        )
    return newest


@contextmanager
def lock_experiment(folder: Path) -> Iterator[list[str]]:
    """Hold `folder`, which is made, for one run; yields notes for the log.

    The lock ends with the process, however that ends. It is one of the process (POSIX), not of the open file as
    flock's is: loader workers are forked, would inherit the latter and outlive a killed run by seconds, in which its
    restart would be refused.

    Raises:
        ValueError: another process holds it; the message names that one's number and host.
        OSError: nothing can be written there.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, _cannot_write(folder, error)) from error
    with handle:
        notes = _take(handle.fileno(), folder, path)
        _probe(folder)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        try:
            yield notes
        finally:
            with suppress(OSError):  # the disk may be gone, and another error under way
                handle.truncate(0)  # the file stays: a run that has just opened it would lock a removed one


def _take(descriptor: int, folder: Path, path: Path) -> list[str]:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            return [f"{folder}: no lock ({error.strerror}): see to it that no second run writes there"]
        holder = path.read_text(encoding="utf-8", errors="replace")[:200] or "another process"
        raise ValueError(
            f"{folder} is in use: {holder} trains there. Wait for it or stop it, then go on with --resume; or train "
            "under another name (--set General.name=...)"
        ) from None
    return []


def _probe(folder: Path) -> None:
    """Write a small file before hours of training do."""
    path = folder / PROBE_FILE
    try:
        with atomic_file(path) as handle:
            handle.write(bytes(PROBE_BYTES))
        path.unlink()
    except OSError as error:
        raise OSError(error.errno, _cannot_write(folder, error)) from error


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"cannot write into {folder}: {error.strerror or error}. Make room or make it writable, or give another place "
        "with --set General.output_root=..."
    )


def store_config(config: Config, text: str) -> list[str]:
    """Write the resolved config into the folder (which is made), and say what differs from the one that lay there."""
    path = experiment_folder(config) / CONFIG_FILE
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    with atomic_file(path) as handle:
        handle.write(text.encode())
    if not before:
        return []
    old = [line for line in before if line not in text.splitlines()]
    new = [line for line in text.splitlines() if line not in before]
    return [f"config was: {line}" for line in old] + [f"config is: {line}" for line in new]
