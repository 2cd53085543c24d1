"""Images that an exported detector is compared on: those of an image set, or of a folder, one a batch."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from config.image_set import ImageSet, resolve
from core.data.coco_index import CocoIndex, open_index
from core.data.dataset import DetectionDataset, Failure
from core.export.certificate import Score
from core.report.evaluation import can_evaluate, evaluate
from models.record import Batch, Record

if TYPE_CHECKING:
    from config.schema import Config
    from core.inference import Detections

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSED = (5, 6, 7, 8)


@dataclass(frozen=True)
class Images:
    """Images as a test reads them, with the function that scores detections of them."""

    name: str
    batches: list[Batch]  # of one image each
    score: Score | None  # None: no annotations


def of_image_set(config: Config, image_set: str | ImageSet, portrait: bool, most: int) -> Images:
    """Return the first images of a set, at most `most`, that have the orientation of the input.

    Raises what `open_index` raises, and ValueError for an image that cannot be read.
    """
    index = open_index(resolve(image_set, config.DatasetParam.data_root))
    dataset = DetectionDataset([index], config.test_transform.sample, keep_empty=True)
    rows = [row for row in range(len(dataset)) if _fits(config, bool(dataset.portrait[row]), portrait)][:most]
    batches = []
    for row in rows:
        record = dataset[0, row]
        if isinstance(record, Failure):
            raise ValueError(record.message)
        batches.append(_batch(record))
    scored = can_evaluate() and index.has_annotation and any(index.has_box[rows])
    return Images(index.image_set.name, batches, _scorer(config, index, batches) if scored else None)


def of_folder(config: Config, folder: Path, portrait: bool, most: int) -> Images:
    """Return the first images of a folder, by name, that have the orientation of the input.

    Raises FileNotFoundError for a folder that does not exist, ValueError for one without images and for an image that
    cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give a folder of images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} has no image ({', '.join(SUFFIXES)}): give a folder of images")
    records = (_record(path, number) for number, path in enumerate(paths))
    fitting = (record for record in records if _fits(config, record["h"] >= record["w"], portrait))
    batches = []
    for record in itertools.islice(fitting, most):
        for transform in config.test_transform.sample:
            transform.apply(record)
        batches.append(_batch(record))
    return Images(str(folder), batches, None)


def _fits(config: Config, is_portrait: bool, portrait: bool) -> bool:
    return is_portrait == portrait or config.ResizeParam.short == config.ResizeParam.long


def _record(path: Path, number: int) -> Record:
    try:
        with Image.open(path) as file:
            width, height = file.size
            if file.getexif().get(_ORIENTATION) in _TRANSPOSED:
                width, height = height, width
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
        raise ValueError(f"cannot read image {path}: {error}; remove it, or fetch it again") from error
    return {
        "im_id": np.array(number, np.int64),
        "image_path": str(path),
        "h": height,
        "w": width,
        "gt_bbox": np.empty((0, 5), np.float32),
        "flipped": False,
    }


def _batch(record: Record) -> Batch:
    return {
        "files": [record["image_path"]],
        "im_id": torch.from_numpy(record["im_id"])[None],
        "image": torch.from_numpy(record["image"])[None],
        "im_info": torch.from_numpy(record["im_info"])[None],
    }


def _scorer(config: Config, index: CocoIndex, batches: Sequence[Batch]) -> Score:
    """Return the function from detections of these images to AP: that of the images alone, not of the whole set."""
    from core.inference import coco_entries

    ids = {int(batch["im_id"][0]) for batch in batches}
    truth = json.loads(Path(index.image_set.annotation).read_bytes())
    truth["images"] = [image for image in truth["images"] if image["id"] in ids]
    truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] in ids]

    def score(detections: Sequence[Detections]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "annotations.json"
            path.write_text(json.dumps(truth), encoding="utf-8")
            entries = list(coco_entries(detections, index.category_ids))
            return evaluate(path, entries, config.TestParam.max_det_per_image).AP

    return score
