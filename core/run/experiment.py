"""The folder of an experiment, `<output_root>/<name>`: its lock, its config, and the checkpoint to start from."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from core.run.atomic_file import atomic_file
from core.weights.checkpoint import Checkpoint, latest

if TYPE_CHECKING:
    from config.schema import Config

CONFIG_FILE = "config.txt"
GRAPH_FILE = "checkpoint-symbol.json"  # as MXNet names it
LOCK_FILE = ".lock"
PROBE_FILE = "probe"
PROBE_BYTES = 1 << 16  # more than the log and the config need at once
_HELD = (errno.EAGAIN, errno.EACCES)  # errors for a lock that another process holds; systems differ


def experiment_folder(config: Config) -> Path:
    return Path(config.TestParam.model.prefix).parent


def find_start(config: Config, resume: bool) -> Checkpoint | None:
    """Return the checkpoint to resume from, which may be the final one; None to start at step 0. Writes nothing.

    Raises ValueError if the folder holds a run and `resume` is not set.
    """
    folder = experiment_folder(config)
    newest = latest(folder) if folder.is_dir() else None
    if newest is None:
        return None
    end_epoch = config.OptimizeParam.schedule.end_epoch
    start_over = "train under another name (--set General.name=...) or remove the folder"
    if not resume and newest.is_finished(end_epoch):
        raise ValueError(
            f"{folder} holds a finished run ({newest.progress.epoch} epochs): {start_over}; to train it further, add "
            "--resume and a larger OptimizeParam.schedule.end_epoch"
        )
    if not resume:
        raise ValueError(
            f"{folder} holds an unfinished run (epoch {newest.progress.epoch} of {end_epoch}, step "
            f"{newest.progress.step}): add --resume to continue it, {start_over}"
        )
    return newest


@contextmanager
def lock_experiment(folder: Path) -> Iterator[list[str]]:
    """Create `folder` and lock it for one run; yields notes for the log.

    The lock is released when the process ends, in whatever way. It belongs to the process (POSIX lockf), not to the
    open file (flock): forked loader workers would inherit the latter, outlive a killed run by seconds, and make its
    restart fail.

    Raises:
        ValueError: another process holds the lock; the message names its process id and host.
        OSError: the folder is not writable.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, _cannot_write(folder, error)) from error
    with handle:
        notes = _acquire(handle.fileno(), folder, path)
        _probe(folder)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        try:
            yield notes
        finally:
            with suppress(OSError):  # the disk may be gone, while another error propagates
                handle.truncate(0)  # the file is kept: a run that has just opened it would lock a removed one


def _acquire(descriptor: int, folder: Path, path: Path) -> list[str]:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            return [f"{folder} cannot be locked ({error.strerror}): make sure that no second run writes to it"]
        holder = path.read_text(encoding="utf-8", errors="replace")[:200] or "another process"
        raise ValueError(
            f"{folder} is in use: {holder} trains there. Wait for it or stop it, then continue with --resume; or train "
            "under another name (--set General.name=...)"
        ) from None
    return []


def _probe(folder: Path) -> None:
    """Write and remove a small file, so that a full or read-only disk is reported before training starts."""
    path = folder / PROBE_FILE
    try:
        with atomic_file(path) as handle:
            handle.write(bytes(PROBE_BYTES))
        path.unlink()
    except OSError as error:
        raise OSError(error.errno, _cannot_write(folder, error)) from error


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"cannot write into {folder}: {error.strerror or error}. Free space or make it writable, or choose another "
        "folder with --set General.output_root=..."
    )


def store_config(config: Config, text: str) -> list[str]:
    """Write the resolved config into the experiment's folder. Returns lines with the differences to the one before."""
    path = experiment_folder(config) / CONFIG_FILE
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    with atomic_file(path) as handle:
        handle.write(text.encode())
    if not before:
        return []
    old = [line for line in before if line not in text.splitlines()]
    new = [line for line in text.splitlines() if line not in before]
    return [f"config was: {line}" for line in old] + [f"config is: {line}" for line in new]


def store_graph(config: Config) -> None:
    """Write the test graph into the experiment's folder, as MXNet loads it. Checkpoints hold it too."""
    with atomic_file(experiment_folder(config) / GRAPH_FILE) as handle:
        handle.write(config.ModelParam.test_symbol.tojson().encode())


def versions() -> dict[str, str]:
    """Return the versions of the programs that a training depends on, by name."""
    found = {"python": platform.python_version()}
    for name in ("necklace", "torch", "numpy"):
        with suppress(PackageNotFoundError):  # used in place, without being installed
            found[name] = version(name)
    return found
