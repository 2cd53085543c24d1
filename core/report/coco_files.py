"""COCO annotation and result files as columns of numbers, checked.

G annotated boxes, D detections, K classes. Boxes are x, y, w, h in pixels of the image. Images and classes are numbered
1.. in the order of their sorted ids, so that ids of any kind (negative, missing, text) can be evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Boxes:
    """Boxes of an image set, in the order of their file."""

    image: np.ndarray  # (n,) int64, 1.. in the order of Truth.image_ids
    category: np.ndarray  # (n,) int64, 1..K
    bbox: np.ndarray  # (n, 4) x, y, w, h

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class TrueBoxes(Boxes):
    """Annotated boxes."""

    area: np.ndarray  # (G,) of the object, which is smaller than its box where a mask was annotated
    crowd: np.ndarray  # (G,) bool: a group of objects; detections inside are neither right nor wrong


@dataclass(frozen=True)
class FoundBoxes(Boxes):
    """Detections."""

    score: np.ndarray  # (D,)


@dataclass(frozen=True)
class Truth:
    """Annotations of an image set."""

    path: Path
    images: tuple[dict[str, Any], ...]  # the entries of the file, in the order of the sorted ids
    image_ids: tuple[Any, ...]
    category_ids: tuple[Any, ...]
    class_names: tuple[str, ...]
    boxes: TrueBoxes


def read_truth(path: str | Path) -> Truth:
    """Read an annotation file.

    Annotations need only image_id, category_id and bbox: a missing area is w * h, a missing iscrowd is 0. Boxes of
    images or categories that the file does not list are left out, as COCO's evaluation does.

    Raises:
        FileNotFoundError, ValueError: the file is missing, not in COCO's format, or has no annotations.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or not {"images", "categories"} <= content.keys():
        raise ValueError(f"{path} is not a COCO annotation file: it needs images, annotations and categories")
    annotations = content.get("annotations")
    if not annotations:
        raise ValueError(
            f"{path} has no annotations to score against. Results on test-dev are scored by COCO's server: "
            "upload the result file there"
        )
    for annotation in annotations:
        if not {"image_id", "category_id", "bbox"} <= annotation.keys():
            raise ValueError(f"{path}: an annotation needs image_id, category_id and bbox, got {annotation}")
    images = _by_id(content["images"])
    categories = _by_id(content["categories"])
    image_ids, category_ids = tuple(images), tuple(categories)
    known = [a for a in annotations if a["image_id"] in images and a["category_id"] in categories]
    bbox = _box_array(known, f"{path}: an annotation")
    area = [a.get("area", w * h) for a, (w, h) in zip(known, bbox[:, 2:].tolist(), strict=True)]
    boxes = TrueBoxes(
        image=_numbers(known, "image_id", image_ids),
        category=_numbers(known, "category_id", category_ids),
        bbox=bbox,
        area=np.array(area, dtype=np.float64),
        crowd=np.array([a.get("iscrowd", 0) for a in known], dtype=bool),
    )
    names = tuple(str(categories[i].get("name", i)) for i in category_ids)
    return Truth(path, tuple(images.values()), image_ids, category_ids, names, boxes)


def read_found(result: str | Path | Sequence[dict[str, Any]], truth: Truth) -> FoundBoxes:
    """Read a result file, or its entries.

    Raises:
        FileNotFoundError, ValueError: the file is missing or not in COCO's format, or the result is of other images.
    """
    entries: Any = read_json(Path(result)) if isinstance(result, str | Path) else result
    if isinstance(result, str | Path) and not isinstance(entries, list):
        raise ValueError(f"{result} is not a COCO result file: it must be a list of detections")
    for entry in entries:
        if not {"image_id", "category_id", "bbox", "score"} <= entry.keys():
            raise ValueError(f"a detection needs image_id, category_id, bbox and score, got {entry}")
    for key, kind, ids in (
        ("image_id", "images", truth.image_ids),
        ("category_id", "categories", truth.category_ids),
    ):
        unknown = {entry[key] for entry in entries} - set(ids)
        if unknown:
            raise ValueError(
                f"the detections name {len(unknown)} {kind} that the annotations do not have, for example "
                f"{key} {min(unknown, key=str)}: score them against the annotations of the images that were tested"
            )
    return FoundBoxes(
        image=_numbers(entries, "image_id", truth.image_ids),
        category=_numbers(entries, "category_id", truth.category_ids),
        bbox=_box_array(entries, "a detection"),
        score=np.array([entry["score"] for entry in entries], dtype=np.float64),
    )


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises FileNotFoundError, and ValueError for a damaged file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or only a part of it ({error}): write it again") from error


def _by_id(entries: Sequence[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    by_id = {entry["id"]: entry for entry in entries}
    return {key: by_id[key] for key in sorted(by_id)}


def _numbers(entries: Sequence[dict[str, Any]], key: str, ids: Sequence[Any]) -> np.ndarray:
    """Return the numbers 1.. of the entries' ids, (n,) int64."""
    number = {value: position for position, value in enumerate(ids, start=1)}
    return np.array([number[entry[key]] for entry in entries], dtype=np.int64)


def _box_array(entries: Sequence[dict[str, Any]], what: str) -> np.ndarray:
    """Return the boxes, (n, 4) float64."""
    try:
        return np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(len(entries), 4)
    except (TypeError, ValueError):
        wrong = next(entry for entry in entries if not _is_box(entry["bbox"]))
        raise ValueError(f"{what} needs a bbox of four numbers [x, y, w, h], got {wrong}") from None


def _is_box(bbox: Any) -> bool:
    return isinstance(bbox, list | tuple) and len(bbox) == 4 and all(isinstance(v, int | float) for v in bbox)
