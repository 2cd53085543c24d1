"""Checkpoints, from which a run is resumed or tested, as safetensors files.

    checkpoint-0003.safetensors            parameters and auxiliary states under their MXNet names (3 epochs), and the
                                           description of the detector (config.description): all that detecting needs
    checkpoint-0003.state.safetensors      the optimizer's momentum at that point
    checkpoint-step00001234.safetensors    the same pair in the middle of an epoch

Files are written atomically. The weights of all epochs are kept, or those of the last few; only the newest state is
kept, and weights from the middle of an epoch only until a later pair is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from config.description import Description
from core.run.atomic_file import atomic_file, temporary_path

FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)  # 2 has no description of the detector
METADATA_KEY = "necklace"
DETECTOR_KEY = "detector"  # of the description, beside the fields of Progress
WEIGHTS_SUFFIX = ".safetensors"
STATE_SUFFIX = ".state.safetensors"
EPOCH_WEIGHTS = r"checkpoint-(\d{4,})\.safetensors"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run, stored in the metadata of both files of a pair."""

    epoch: int  # finished epochs
    step: int  # finished updates
    seed: int
    experiment: str
    num_sample: int = 0  # samples per epoch
    sample: int = 0  # samples taken from the unfinished epoch
    portrait: int = 0  # the number of portrait ones among them, if batches hold one orientation
    class_names: tuple[str, ...] = ()

    @property
    def reached(self) -> tuple[int, int, int]:
        """Key to sort by. Steps alone do not suffice, as a resume may change the global batch size."""
        return self.epoch, self.sample, self.step

    @property
    def epochs(self) -> float:
        """The number of finished epochs plus the fraction of the next one."""
        return self.epoch + (self.sample / self.num_sample if self.num_sample else 0.0)

    def to_metadata(self, description: Description | None = None) -> dict[str, str]:
        """Return safetensors metadata with a single entry, because the library writes several in random order."""
        detector = {DETECTOR_KEY: description.to_json()} if description is not None else {}
        return {METADATA_KEY: json.dumps({"format_version": FORMAT_VERSION, **asdict(self), **detector})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> Progress:
        """Parse the result of `to_metadata`; `path` is named in errors.

        Raises:
            ValueError: the metadata is not that of a checkpoint, or is of another format version.
        """
        stored = _stored(metadata, path)
        stored.pop(DETECTOR_KEY, None)
        kinds = {entry.name: type(entry.default) for entry in fields(cls)} | _REQUIRED
        for name, kind in kinds.items():
            if name not in stored or not _is_kind(stored[name], kind):
                raise ValueError(
                    f"{path} is damaged: its metadata has {name} {stored.get(name)!r:.80}, expected {_KINDS[kind]}"
                )
        if unknown := stored.keys() - kinds.keys():
            raise ValueError(f"{path} is damaged: its metadata has {sorted(unknown)!r:.80}, which no checkpoint has")
        return cls(**stored | {"class_names": tuple(stored["class_names"])})


def _stored(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Return the object that `Progress.to_metadata` stored, without its version."""
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} is not a checkpoint of this program: its metadata has no entry {METADATA_KEY}. "
            "Backbone weights are given by ModelParam.pretrain.prefix instead"
        )
    try:
        stored = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, nested too deeply
        raise ValueError(f"{path} is damaged: its metadata is not JSON ({error})") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: its metadata is a {type(stored).__name__}, not an object")
    version = stored.pop("format_version", None)
    if type(version) is not int or version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ValueError(f"{path} has checkpoint format {version!r:.40}, this program reads {readable}")
    return stored


_REQUIRED: dict[str, type] = {"epoch": int, "step": int, "seed": int, "experiment": str}
_KINDS = {int: "a number of 0 or more", str: "a text", tuple: "a list of texts"}


def _is_kind(value: Any, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    return type(value) is kind


@dataclass(frozen=True)
class Checkpoint:
    """A complete pair of files."""

    weights: Path
    state: Path
    progress: Progress

    def is_finished(self, end_epoch: int) -> bool:
        """Return True if no epoch is left to train."""
        return self.progress.epoch >= end_epoch


def epoch_stem(epoch: int) -> str:
    """Return the file stem after `epoch` finished epochs."""
    return f"checkpoint-{epoch:04d}"


def step_stem(step: int) -> str:
    """Return the file stem in the middle of an epoch, after `step` updates."""
    return f"checkpoint-step{step:08d}"


def save_checkpoint(
    folder: str | Path,
    stem: str,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    progress: Progress,
    keep: int = 0,
    description: Description | None = None,
) -> Checkpoint:
    """Write a pair, then remove the files that it replaces.

    Args:
        stem: `epoch_stem(...)` or `step_stem(...)`.
        weights: parameters and auxiliary states by name, on any device.
        state: the optimizer's `state_dict()`.
        description: of the detector; without one the config is needed to use the weights.
        keep: the number of last epochs whose weights are kept; 0: all.

    Raises:
        OSError: the disk is full, read only, ...; earlier checkpoints are unchanged and the message names the
            newest.
    """
    folder = Path(folder)
    pair = Checkpoint(folder / f"{stem}{WEIGHTS_SUFFIX}", folder / f"{stem}{STATE_SUFFIX}", progress)
    try:
        # both are written before one is renamed, the state first: weights without a state are complete
        with atomic_file(pair.weights) as weights_file, atomic_file(pair.state) as state_file:
            state_file.write(_serialise(state, progress.to_metadata()))
            weights_file.write(_serialise(weights, progress.to_metadata(description)))
    except OSError as error:
        if pair.state.exists() and not pair.weights.exists():
            pair.state.unlink()
        needed = sum(tensor.nbytes for tensor in (*weights.values(), *state.values()))
        raise OSError(error.errno, _write_failure(pair, needed, error)) from error
    prune(pair, keep)
    return pair


def _serialise(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(on_host, metadata)


def _write_failure(pair: Checkpoint, needed: int, error: OSError) -> str:
    folder = pair.weights.parent
    message = f"cannot write {pair.weights}: {error.strerror or error}."
    if folder.is_dir():
        free = shutil.disk_usage(folder).free
        message += f" A checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free."
        pairs = _pairs(folder)
        if pairs:
            message += f" The previous one, {pairs[-1].weights}, is complete."
    return message + " Free space or make the folder writable, then continue with --resume."


def prune(newest: Checkpoint, keep: int) -> None:
    """Remove the files that the newest pair replaces, also those left by a run that was killed.

    `newest` must be complete and synced to disk.
    """
    folder = newest.weights.parent
    for path in folder.glob(f"checkpoint-*{STATE_SUFFIX}"):
        if path != newest.state:
            path.unlink(missing_ok=True)
    for path in folder.glob(f"checkpoint-step*{WEIGHTS_SUFFIX}"):
        if path not in (newest.weights, newest.state):
            path.unlink(missing_ok=True)
    if keep:
        # found by name, since a damaged file must not stop a run
        matches = [(re.fullmatch(EPOCH_WEIGHTS, path.name), path) for path in folder.iterdir()]
        epochs = sorted((int(match[1]), path) for match, path in matches if match)
        for _, path in [(epoch, path) for epoch, path in epochs if epoch <= newest.progress.epoch][:-keep]:
            path.unlink(missing_ok=True)
    for path in folder.glob(temporary_path(folder / "checkpoint-*").name):  # left by a process that was killed
        path.unlink(missing_ok=True)


def latest(folder: str | Path) -> Checkpoint | None:
    """Return the newest complete pair; None if the folder holds no checkpoint.

    Raises:
        ValueError: a file is damaged; or there are weights without any state, so that resuming is impossible and
            starting over would overwrite them.
    """
    folder = Path(folder)
    pairs = _pairs(folder)
    if pairs:
        return pairs[-1]
    alone = _weights_files(folder)
    if alone:
        raise ValueError(
            f"{folder} holds weights ({alone[-1].name}) but not the optimizer state that resuming needs. To "
            f"start from these weights, train under another name: --set General.name=<name> "
            f"--set ModelParam.init_from={alone[-1]}; to start over, remove the folder"
        )
    return None


def find_weights(folder: str | Path, epoch: int | None = None) -> Path:
    """Return the weights to test: those after `epoch` epochs, or the newest.

    Raises:
        FileNotFoundError: there are none; the message lists those that exist.
    """
    folder = Path(folder)
    name = "checkpoint" if epoch is None else f"{epoch_stem(epoch)}{WEIGHTS_SUFFIX}"
    if epoch is not None and (folder / name).is_file():
        return folder / name
    files = _weights_files(folder)
    if epoch is None and files:
        return files[-1]
    advice = f"it holds {', '.join(path.name for path in files)}" if files else "train first with detection_train.py"
    raise FileNotFoundError(f"no {name} in {folder}: {advice}")


def _weights_files(folder: Path) -> list[Path]:
    """Return all weights files, oldest first."""
    files = [p for p in folder.glob(f"checkpoint-*{WEIGHTS_SUFFIX}") if not p.name.endswith(STATE_SUFFIX)]
    return sorted(files, key=lambda path: _read_progress(path).reached)


def _pairs(folder: Path) -> list[Checkpoint]:
    """Return all complete pairs, oldest first."""
    pairs = []
    for state in folder.glob(f"checkpoint-*{STATE_SUFFIX}"):
        weights = state.with_name(state.name.removesuffix(STATE_SUFFIX) + WEIGHTS_SUFFIX)
        if weights.exists():
            progress = _read_progress(weights)
            if _read_progress(state) == progress:
                pairs.append(Checkpoint(weights, state, progress))
    return sorted(pairs, key=lambda pair: pair.progress.reached)


def _read_progress(path: Path) -> Progress:
    return Progress.from_metadata(read_metadata(path), path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, without its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged.
    """
    with _open(Path(path)) as handle:
        return dict(handle.metadata() or {})


def read_description(path: str | Path) -> Description | None:
    """Return the description of the detector in a checkpoint; None for one that was written without it.

    Raises ValueError if the file is damaged or no checkpoint.
    """
    path = Path(path)
    stored = _stored(read_metadata(path), path)
    if DETECTOR_KEY not in stored:
        return None
    try:
        return Description.from_json(stored[DETECTOR_KEY])
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged.
    """
    with _open(Path(path)) as handle:
        try:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
        except Exception as error:  # shapes, numbers and types that torch does not support
            raise ValueError(_damaged(Path(path), error)) from error


def _open(path: Path) -> safetensors.safe_open:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give the path of a .safetensors or .params file")
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OverflowError) as error:
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} is damaged or not a safetensors file ({str(error)[:200]}): get it again, or use an earlier checkpoint"
    )


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], Progress]:
    """Read parameters and auxiliary states by name, and the progress of the run that wrote them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or not a checkpoint.
    """
    path = Path(path)
    refuse_state(path)
    return read_tensors(path), _read_progress(path)


def refuse_state(path: Path) -> None:
    """Raise ValueError for the state file of a pair, which looks like weights: the momentum has their names."""
    if path.name.endswith(STATE_SUFFIX):
        weights = path.name.removesuffix(STATE_SUFFIX) + WEIGHTS_SUFFIX
        raise ValueError(f"{path} holds the momentum of a run, not weights: those are in {weights} beside it")
