"""Parsing of a COCO json into the columns of its index.

N images, M boxes of all images. Boxes are xyxy in pixels of the image file, with inclusive corners; classes
are numbered 1..K in the order of the sorted category ids.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from config.image_set import checked_categories, is_unicode, read_json

Columns = dict[str, np.ndarray]

_ANNOTATION_KEYS = frozenset({"id", "image_id", "category_id", "bbox"})
_IMAGE_KEYS = ("id", "file_name", "height", "width")
_SHOWN = 5  # ids that an error names, at most
_SHOWN_TEXT = 200  # characters of an entry in an error


def read_columns(path: str) -> tuple[dict[str, Any], Columns]:
    """Return the metadata (JSON values) and the columns of a COCO json, as `core.data.coco_index.CocoIndex` has them.

    A box (x, y, w, h) of an image of size W x H becomes x1 = max(0, x), x2 = min(W - 1, x1 + max(0, w - 1)),
    and the same for y. Crowd boxes, boxes of area <= 0 and boxes that lie outside the image are left out.

    Raises ValueError, naming the json and the entries at fault: not JSON, missing lists or keys, no
    categories, duplicate ids, boxes that are not four finite numbers, unknown images or categories.
    """
    annotations = _Annotations(path)
    content = read_json(path, object_hook=annotations.take)
    categories = checked_categories(content.get("categories"), path)
    images = _checked_images(content.get("images"), path)
    has_annotation = bool(content.get("annotations"))  # an empty list counts as none
    _check_all_taken(content.get("annotations", []), len(annotations.id), path)
    image_id = np.array([image["id"] for image in images], np.int64)
    _check_unique(image_id, "images", path)
    names = [image["file_name"].encode() for image in images]
    height = np.array([image["height"] for image in images], np.int32)
    width = np.array([image["width"] for image in images], np.int32)
    box, box_offset, left_out = _boxes(annotations, image_id, height, width, [i for i, _ in categories])
    meta: dict[str, Any] = {
        "has_annotation": has_annotation,
        "category_ids": [i for i, _ in categories],
        "class_names": [name for _, name in categories],
        **left_out,
    }
    columns: Columns = {
        "image_id": image_id,
        "height": height,
        "width": width,
        "name_offset": np.cumsum([0] + [len(name) for name in names], dtype=np.int64),
        "name_bytes": np.frombuffer(b"".join(names), np.uint8),
        "box_offset": box_offset,
        "box": box,
    }
    return meta, columns


@dataclass
class _Annotations:
    """Columns of the annotations' numbers, without a Python object per box."""

    path: str
    id: array[int] = field(default_factory=lambda: array("q"))
    image_id: array[int] = field(default_factory=lambda: array("q"))
    category_id: array[int] = field(default_factory=lambda: array("q"))
    xywh: array[float] = field(default_factory=lambda: array("d"))
    area: array[float] = field(default_factory=lambda: array("d"))
    crowd: array[int] = field(default_factory=lambda: array("b"))

    def take(self, item: dict[str, Any]) -> dict[str, Any] | None:
        """Object hook of json: append an annotation to the columns and replace it by None; reduce an image to the
        fields that are used; return other objects unchanged."""
        if not item.keys() >= _ANNOTATION_KEYS:
            return {key: item[key] for key in _IMAGE_KEYS if key in item} if "file_name" in item else item
        box = item["bbox"]
        try:
            if len(box) != 4:
                raise TypeError
            self.xywh.extend(box)
            self.area.append(item.get("area", box[2] * box[3]))
            if item.get("iscrowd", 0) not in (0, 1):
                raise TypeError
            self.crowd.append(int(item.get("iscrowd", 0)))
            self.id.append(item["id"])
            self.image_id.append(item["image_id"])
            self.category_id.append(item["category_id"])
        except (TypeError, OverflowError):
            shown = {key: item[key] for key in (*sorted(_ANNOTATION_KEYS), "area", "iscrowd") if key in item}
            raise ValueError(
                f"{self.path}: annotation {str(shown)[:_SHOWN_TEXT]}: expected integer ids, iscrowd 0 or 1, a numeric "
                f"area and a bbox of four numbers [x, y, width, height]"
            ) from None
        return None


def _checked_images(images: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(images, list):
        raise ValueError(f"{path}: 'images' is missing or no list; give a COCO instances_*.json")
    for i, image in enumerate(images):
        keys = image.keys() if isinstance(image, dict) else ()
        missing = [key for key in _IMAGE_KEYS if key not in keys]
        if missing:
            raise ValueError(f"{path}: images[{i}] has no {', '.join(map(repr, missing))}: {str(image)[:_SHOWN_TEXT]}")
        numbers = [image[key] for key in ("id", "height", "width")]
        sides_fit = (
            all(type(x) is int for x in numbers) and abs(numbers[0]) < 2**63 and all(0 < x < 2**31 for x in numbers[1:])
        )
        if not sides_fit or not isinstance(image["file_name"], str) or not image["file_name"]:
            raise ValueError(
                f"{path}: images[{i}]: expected an integer id, a file name, and height and width as positive "
                f"integers, got {str(image)[:_SHOWN_TEXT]}"
            )
        if not _is_inside_folder(image["file_name"]):
            raise ValueError(
                f"{path}: images[{i}]: file name {image['file_name'][:_SHOWN_TEXT]!r} is no path below the image "
                f"folder; expected such as '000000000139.jpg', without '..' and not absolute"
            )
    return images


def _is_inside_folder(file_name: str) -> bool:
    """Return True for a relative path inside the image folder: an untrusted json must not read files outside of it."""
    is_inside = not file_name.startswith("/") and ".." not in file_name.split("/")
    return is_inside and "\0" not in file_name and "\\" not in file_name and is_unicode(file_name)


def _check_all_taken(annotations: Any, num_taken: int, path: str) -> None:
    """Raise ValueError unless exactly the items of `annotations` were appended to the columns."""
    if not isinstance(annotations, list):
        raise ValueError(f"{path}: 'annotations' is no list but {type(annotations).__name__}")
    for i, item in enumerate(annotations):
        if item is not None:
            missing = sorted(_ANNOTATION_KEYS - item.keys()) if isinstance(item, dict) else "not an object"
            raise ValueError(f"{path}: annotations[{i}] lacks {missing}: {str(item)[:_SHOWN_TEXT]}")
    if num_taken != len(annotations):
        raise ValueError(
            f"{path}: {num_taken} objects have the keys of an annotation, but 'annotations' holds "
            f"{len(annotations)}; remove 'bbox' from the others"
        )


def _check_unique(ids: np.ndarray, what: str, path: str) -> None:
    values, count = np.unique(ids, return_counts=True)
    if (count > 1).any():
        raise ValueError(f"{path}: {_listed(values[count > 1])} in '{what}' more than once; ids must be unique")


def _listed(ids: Sequence[Any] | np.ndarray) -> str:
    shown = ", ".join(str(i) for i in ids[:_SHOWN])
    return f"id {shown}" + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")


def _boxes(
    annotations: _Annotations,
    image_id: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    category_ids: list[int],
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Return the boxes to train on, (M, 5) float32 in the order of the images, their offsets, (N + 1,) int64, and the
    number of boxes left out, by reason."""
    path = annotations.path
    ids = np.frombuffer(annotations.id, np.int64)  # views: there may be tens of millions of boxes
    xywh = np.frombuffer(annotations.xywh, np.float64).reshape(-1, 4)  # (M, 4)
    area = np.frombuffer(annotations.area, np.float64)
    _check_unique(ids, "annotations", path)
    bad = ~(np.isfinite(xywh).all(axis=1) & np.isfinite(area))
    if bad.any():
        raise ValueError(
            f"{path}: annotation {_listed(ids[bad])}: bbox or area is NaN or infinite; correct or remove them"
        )
    order = np.argsort(image_id)
    image = _positions(np.frombuffer(annotations.image_id, np.int64), image_id[order], ids, "image_id", path)
    image = order[image] if len(order) else image
    category = np.frombuffer(annotations.category_id, np.int64)
    label = _positions(category, np.array(category_ids), ids, "category_id", path) + 1
    x, y, w, h = xywh.T
    x1, y1 = np.maximum(0, x), np.maximum(0, y)
    x2 = np.minimum(width[image] - 1, x1 + np.maximum(0, w - 1))
    y2 = np.minimum(height[image] - 1, y1 + np.maximum(0, h - 1))
    outside = (x + np.maximum(1, w) <= 0) | (y + np.maximum(1, h) <= 0) | (x2 < x1) | (y2 < y1)
    crowd, fit = np.frombuffer(annotations.crowd, bool), (area > 0) & ~outside
    keep = ~crowd & fit
    left_out = {"num_crowd": int(crowd.sum()), "num_unfit": int((~crowd & ~fit).sum())}
    box = np.column_stack([column[keep].astype(np.float32) for column in (x1, y1, x2, y2, label)])
    image = image[keep]
    offset = np.concatenate([[0], np.cumsum(np.bincount(image, minlength=len(image_id)))])
    return box[np.argsort(image, kind="stable")], offset.astype(np.int64), left_out


def _positions(values: np.ndarray, known: np.ndarray, ids: np.ndarray, what: str, path: str) -> np.ndarray:
    """Return the position of each value in the sorted `known`. Raises ValueError, naming annotations, for others."""
    position = np.searchsorted(known, values)
    unknown = position == len(known)
    unknown[~unknown] = known[position[~unknown]] != values[~unknown]
    if unknown.any():
        raise ValueError(
            f"{path}: annotation {_listed(ids[unknown])} names {what} {values[unknown][0]}, "
            f"which '{'images' if what == 'image_id' else 'categories'}' does not have"
        )
    return position
