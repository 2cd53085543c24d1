"""Images that an exported detector is compared on: those of an image set, or of a folder, one a batch."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from config.image_set import ImageSet, resolve
from core.data.batch_reader import collate
from core.data.coco_index import CocoIndex, open_index
from core.data.dataset import DetectionDataset, Failure
from core.data.image import read_picture
from core.data.picture import files_below, picture_record
from core.export.certificate import Score
from core.report.evaluation import can_evaluate, evaluate
from models.record import Batch

if TYPE_CHECKING:
    from config.schema import Config
    from core.inference import Detections


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
        batches.append(collate([record]))
    scored = can_evaluate() and index.has_annotation and any(index.has_box[rows])
    return Images(index.image_set.name, batches, _scorer(config, index, batches) if scored else None)


def of_folder(config: Config, folder: Path, portrait: bool, most: int) -> Images:
    """Return the first images of a folder, by name, that have the orientation of the input.

    Raises FileNotFoundError for a folder that does not exist, ValueError for one without images and for an image that
    cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give a folder of images")
    paths = files_below(folder)
    if not paths:
        raise ValueError(f"{folder} has no image: give a folder of images")
    pictures = ((number, path, read_picture(path)) for number, path in enumerate(paths))
    fitting = (one for one in pictures if _fits(config, one[2].shape[0] >= one[2].shape[1], portrait))
    transforms = config.test_transform.sample
    records = (picture_record(pixels, number, transforms, str(path)) for number, path, pixels in fitting)
    return Images(str(folder), [collate([record]) for record in itertools.islice(records, most)], None)


def _fits(config: Config, is_portrait: bool, portrait: bool) -> bool:
    return is_portrait == portrait or config.ResizeParam.short == config.ResizeParam.long


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
