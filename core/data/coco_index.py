"""Index of a COCO json: columns on disk, built once, memory-mapped and shared by all worker processes.

N images, G boxes of one image, M boxes of all images. Boxes are xyxy in pixels of the image file, with
inclusive corners; classes are numbered 1..K in the order of the sorted category ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from config.image_set import ImageSet, require_annotation, require_image_dir
from core.data.coco_columns import Columns, read_columns
from core.run.atomic_file import atomic_file

_FORMAT = 3  # part of the cache key: raise it when the columns or the rule for boxes change
_META = "meta.json"
_SHOWN = 5  # images that an error names, at most
_TIME_RESOLUTION_NS = 2 * 10**9  # file systems store times to 2 s or better


@dataclass(frozen=True)
class CocoIndex:
    """The images of one image set and the boxes to train on. Columns are read-only memory maps."""

    image_set: ImageSet
    folder: str
    has_annotation: bool  # False for image_info files, which hold no boxes
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    num_crowd: int  # boxes that are left out as crowds
    num_unfit: int  # boxes that are left out without area or outside of their image
    image_id: np.ndarray  # (N,) int64
    height: np.ndarray  # (N,) int32
    width: np.ndarray  # (N,) int32
    name_offset: np.ndarray  # (N + 1,) int64, into name_bytes
    name_bytes: np.ndarray  # uint8, all file names in UTF-8
    box_offset: np.ndarray  # (N + 1,) int64, into box
    box: np.ndarray  # (M, 5) float32: x1, y1, x2, y2, class

    @property
    def num_image(self) -> int:
        return len(self.image_id)

    @property
    def has_box(self) -> np.ndarray:
        """(N,) bool: True for images with a box to train on."""
        return np.diff(self.box_offset) > 0

    def file_name(self, i: int) -> str:
        """Return the json's file name of an image, relative to the image folder."""
        return self.name_bytes[self.name_offset[i] : self.name_offset[i + 1]].tobytes().decode()

    def file_names(self) -> list[str]:
        """Return all file names; faster than one by one."""
        content, offset = self.name_bytes.tobytes(), self.name_offset.tolist()
        return [content[a:b].decode() for a, b in pairwise(offset)]

    def image_path(self, i: int) -> str:
        return os.path.join(self.image_set.image_dir, self.file_name(i))

    def gt_bbox(self, i: int) -> np.ndarray:
        """Return a copy of an image's boxes, (G, 5) float32: x1, y1, x2, y2 (file pixels, inclusive), class 1..K."""
        return np.array(self.box[self.box_offset[i] : self.box_offset[i + 1]])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the folder alone: the receiving process maps the same files instead of copying the columns."""
        return _load, (Path(self.folder), self.image_set)


def open_index(image_set: ImageSet, cache_root: str | None = None, require_images: bool = True) -> CocoIndex:
    """Return the index of an image set; builds it if it is not in the cache yet.

    The cache is `cache_root`, else $NECKLACE_CACHE, else ~/.cache/necklace. An index belongs to one state of
    the json (path, size, modification time); one that cannot be read is rebuilt. `read_columns` documents
    the boxes in it.

    `require_images` checks that every image file exists. The image folders are listed once, and again when their
    modification times change, as they do when a file is removed.

    Raises FileNotFoundError for a missing json, image folder or required image file; ValueError, naming the json
    and the entries at fault, for one that is not valid COCO; OSError where the cache cannot be written.
    """
    require_annotation(image_set)
    require_image_dir(image_set)
    root = Path(cache_root or os.environ.get("NECKLACE_CACHE") or "~/.cache/necklace").expanduser()
    stat = os.stat(image_set.annotation)
    state = f"{_FORMAT} {os.path.realpath(image_set.annotation)} {stat.st_size} {stat.st_mtime_ns}"
    folder = root / f"{Path(image_set.annotation).stem}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    existed = folder.exists()
    try:
        index = _load(folder, image_set)
    except (OSError, EOFError, ValueError, KeyError, TypeError):  # absent or damaged
        if existed:  # otherwise another process may have written a valid one since
            shutil.rmtree(folder, ignore_errors=True)
        _store(*read_columns(image_set.annotation), folder)
        index = _load(folder, image_set)
    if require_images:
        _check_images(index)
    return index


def _load(folder: Path, image_set: ImageSet) -> CocoIndex:
    meta = json.loads((folder / _META).read_text())
    columns = {}
    for name, shape in meta["column"].items():
        columns[name] = np.load(folder / f"{name}.npy", mmap_mode="r" if shape[0] else None, allow_pickle=False)
        if columns[name].shape != tuple(shape):
            raise ValueError(f"{folder}/{name}.npy: expected shape {shape}, got {columns[name].shape}")
    return CocoIndex(
        image_set=image_set,
        folder=str(folder),
        has_annotation=meta["has_annotation"],
        category_ids=tuple(meta["category_ids"]),
        class_names=tuple(meta["class_names"]),
        num_crowd=meta["num_crowd"],
        num_unfit=meta["num_unfit"],
        **columns,
    )


def _store(meta: dict[str, Any], columns: Columns, folder: Path) -> None:
    """Write to a temporary folder and rename it, so that other processes never see an incomplete index."""
    meta = meta | {"column": {name: column.shape for name, column in columns.items()}}
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        temporary.chmod(0o755)  # mkdtemp's 0700 would exclude other users of a shared cache
        for name, column in columns.items():
            np.save(temporary / f"{name}.npy", column, allow_pickle=False)
        (temporary / _META).write_text(json.dumps(meta))
        if not _renamed(temporary, folder):
            shutil.rmtree(temporary)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"cannot write the index of the annotations to {folder}: {error}; "
            f"set NECKLACE_CACHE to a writable folder with free space"
        ) from error


def _renamed(temporary: Path, folder: Path) -> bool:
    """Rename the folder; returns False if another process has written the same index meanwhile."""
    try:
        temporary.rename(folder)
    except OSError:
        if (folder / _META).exists():
            return False
        raise
    return True


def _check_images(index: CocoIndex) -> None:
    """Raise FileNotFoundError, naming some, if images are missing; store the result of a successful check."""
    image_dir = index.image_set.image_dir
    path = os.fsencode(os.path.abspath(image_dir))  # image sets in different folders may share a json
    known = Path(index.folder, f"images-{hashlib.sha256(path).hexdigest()[:16]}.json")
    if _is_unchanged(known):
        return
    start = time.time_ns()
    folders = {folder: _modified(folder) for folder in _image_folders(index)}  # read before the folders are listed
    missing = _missing_images(index)
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise FileNotFoundError(
            f"image set {index.image_set.name!r}: {len(missing)} of {index.num_image} images named "
            f"in {index.image_set.annotation} are not in {image_dir}: {shown}; {index.image_set.remedy}"
        )
    # in a folder modified just now, a file may still be removed under the same time stamp
    if all(time_ns is not None and time_ns < start - _TIME_RESOLUTION_NS for time_ns in folders.values()):
        with suppress(OSError), atomic_file(known) as file:  # in a read-only cache the check is repeated every time
            file.write(json.dumps(folders).encode())


def _is_unchanged(known: Path) -> bool:
    """Return True if the folders have the modification times of the last successful check."""
    try:
        folders = json.loads(known.read_bytes())
        return bool(folders) and all(_modified(folder) == time_ns for folder, time_ns in folders.items())
    except (OSError, ValueError, AttributeError):  # absent or damaged
        return False


def _modified(folder: str) -> int | None:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None


def _image_folders(index: CocoIndex) -> set[str]:
    """Return all folders that contain images."""
    slash = (index.name_bytes == ord("/")).any()
    below = {os.path.dirname(name) for name in index.file_names()} if slash else set()
    return {os.path.join(os.path.abspath(index.image_set.image_dir), name) for name in {"", *below}}


def _missing_images(index: CocoIndex) -> list[str]:
    """Return the images without a file. Lists each folder once: a stat per image takes minutes on a network disk."""
    directly = set(os.listdir(index.image_set.image_dir))
    listed: dict[str, set[str]] = {}
    missing = []
    for file_name in index.file_names():
        if file_name in directly:  # COCO has no subfolders: a million images in half a second
            continue
        folder, name = os.path.split(os.path.join(index.image_set.image_dir, file_name))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        # on file systems that ignore case or normalise names, a file may exist under another listed name
        if name not in listed[folder] and not os.path.exists(os.path.join(folder, name)):
            missing.append(file_name)
    return missing
