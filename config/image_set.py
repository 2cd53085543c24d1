"""Paths of an image set's images and annotations, and its classes.

A dataset is a folder of the data root in COCO's layout:

    <data root>/<dataset>/annotations/instances_<split>.json   or image_info_<split>.json (no boxes)
    <data root>/<dataset>/images/<split>/
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final


@dataclass(frozen=True)
class ImageSet:
    """A COCO annotation file and the folder that its image file names are relative to."""

    name: str
    annotation: str
    image_dir: str
    by_name: bool = field(default=False, repr=False, compare=False)  # paths derived from the data root by `resolve`

    @property
    def remedy(self) -> str:
        """The advice for error messages about missing files."""
        if self.by_name:
            return "put the files there, or name the folder that holds them with --data-root (DatasetParam.data_root)"
        return "put the files there, or correct the path in the config's ImageSet (--data-root has no effect on it)"


@dataclass(frozen=True)
class Published:
    """Facts about a public image set that do not need its files."""

    num_class: int
    num_image: int  # in training splits: images with at least one box to train on


PUBLISHED: Final[Mapping[str, Published]] = {
    "coco_train2017": Published(num_class=80, num_image=117266),
    "coco_val2017": Published(num_class=80, num_image=4952),
    "coco_test-dev2017": Published(num_class=80, num_image=20288),
    # the 2014 split of the same images: train + valminusminival = train2017, minival = val2017
    "coco_train2014": Published(num_class=80, num_image=82081),
    "coco_val2014": Published(num_class=80, num_image=40137),
    "coco_valminusminival2014": Published(num_class=80, num_image=35185),
    "coco_minival2014": Published(num_class=80, num_image=4952),
}

# subsets of val2014 with their own annotation files but no image folder
_IMAGES: Final[Mapping[str, str]] = {"minival2014": "val2014", "valminusminival2014": "val2014"}


def resolve(image_set: str | ImageSet, data_root: str) -> ImageSet:
    """Return an image set with its paths; an `ImageSet` is returned unchanged.

    `coco_train2017` is `<data root>/coco/annotations/instances_train2017.json` with
    `<data root>/coco/images/train2017`. COCO publishes no boxes for its test splits: if
    `instances_<split>.json` does not exist, a split `test...` uses `image_info_<split>.json`. The images of
    `test-dev2017` are in `images/test2017`, those of `minival2014` and `valminusminival2014` in `images/val2014`.

    Does not check that the files exist; `class_names` and `core.data.coco_index.open_index` do.
    Raises ValueError for a name that is not `<dataset>_<split>`.
    """
    if isinstance(image_set, ImageSet):
        return image_set
    dataset, underscore, split = image_set.partition("_")
    if not (dataset and underscore and split) or "/" in image_set:
        raise ValueError(
            f"DatasetParam.image_set: expected <dataset>_<split>, such as 'coco_train2017', or an "
            f"ImageSet(name, annotation, image_dir), got {image_set!r}"
        )
    folder = Path(data_root).expanduser() / dataset
    annotation = folder / "annotations" / f"instances_{split}.json"
    if split.startswith("test") and not annotation.exists():
        annotation = annotation.with_name(f"image_info_{split}.json")
    image_dir = folder / "images" / _IMAGES.get(split, split.replace("test-dev", "test"))
    return ImageSet(image_set, str(annotation), str(image_dir), by_name=True)


def require_annotation(image_set: ImageSet) -> None:
    """Raise FileNotFoundError, naming the first missing folder, if the annotation file does not exist."""
    if not Path(image_set.annotation).is_file():
        raise FileNotFoundError(_missing(image_set, "annotation file", image_set.annotation))


def require_image_dir(image_set: ImageSet) -> None:
    """Raise FileNotFoundError, naming the first missing folder, if the image folder does not exist."""
    if not Path(image_set.image_dir).is_dir():
        raise FileNotFoundError(_missing(image_set, "image folder", image_set.image_dir))


def class_names(image_set: ImageSet) -> tuple[str, ...]:
    """Return the names of the foreground classes 1..K, ordered by category id.

    Only the `categories` array is parsed, so that a file of hundreds of megabytes takes one scan of its bytes.

    Raises FileNotFoundError if the annotation file is missing, ValueError if it is not in COCO's format.
    """
    require_annotation(image_set)
    categories = _scan_categories(image_set.annotation)
    if categories is None:
        content = read_json(image_set.annotation)
        categories = content.get("categories")
    return tuple(name for _, name in checked_categories(categories, image_set.annotation))


def read_json(path: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    """Return the JSON object in a file; `object_hook` as in `json.loads`.

    Raises ValueError, naming the file and position, if it holds none.
    """
    try:
        content = json.loads(_read_text(path), object_hook=object_hook)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); the file may be truncated: download or write it again"
        ) from None
    except ValueError as error:  # raised by the hook, or by a number with thousands of digits
        raise ValueError(str(error) if path in str(error) else f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object with images, annotations and categories, as in COCO's "
            f"instances_*.json, got a {type(content).__name__}"
        )
    return content


def _read_text(path: str) -> str:
    """Return the text decoded as `json.loads` does, and free the bytes before the text is parsed."""
    content = Path(path).read_bytes()
    return content.decode(json.detect_encoding(content), "surrogatepass")


def checked_categories(categories: Any, path: str) -> list[tuple[int, str]]:
    """Return (category id, name) pairs sorted by id. Raises ValueError if there are none, or two with one id."""
    if not isinstance(categories, list) or not categories:
        found = "is missing or not a list" if not isinstance(categories, list) else "is empty"
        raise ValueError(
            f"{path}: 'categories' {found}; expected a list such as [{{'id': 1, 'name': 'person'}}, ...] "
            f"with every class of the dataset"
        )
    pairs: dict[int, str] = {}
    for i, category in enumerate(categories):
        if not _is_category(category):
            raise ValueError(
                f"{path}: categories[{i}] is {category!r:.200}; expected an object with an integer 'id' and "
                f"a string 'name'"
            )
        if category["id"] in pairs:
            raise ValueError(f"{path}: category id {category['id']} appears twice; ids must be unique")
        pairs[category["id"]] = category["name"]
    return sorted(pairs.items())


def _is_category(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("id")) is not int or not isinstance(value.get("name"), str):
        return False
    return abs(value["id"]) < 2**63 and is_unicode(value["name"])


def is_unicode(text: str) -> bool:
    """Return False for text with a lone surrogate, which JSON can encode but file names and terminals cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _missing(image_set: ImageSet, what: str, path: str) -> str:
    parents = [parent for parent in Path(path).absolute().parents if not parent.exists()]
    gone = f" (the folder {parents[-1]} does not exist)" if parents else ""
    return f"image set {image_set.name!r}: {what} {path} not found{gone}; {image_set.remedy}"


def _scan_categories(path: str) -> list[Any] | None:
    """Return the value of the only `"categories"` key in a file; None if it takes a full parse to find it."""
    key = b'"categories"'
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            position = content.find(key)
            if position < 0 or content.find(key, position + 1) >= 0:
                return None
            tail = content[position + len(key) : position + (1 << 20)]  # 4 kB in COCO
    text = tail.decode(errors="ignore").lstrip().removeprefix(":").lstrip()
    try:
        categories, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # truncated, or invalid: the full parse reports the reason
        return None
    return categories if isinstance(categories, list) and all(map(_is_category, categories)) else None
