"""Dataset of samples: the images of one or several image sets, after the sample transforms of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from core.data.coco_index import CocoIndex
from models.record import Record

Key = tuple[int, int]  # epoch, sample


@dataclass(frozen=True)
class Failure:
    """An error for the user, returned by a worker: torch would turn an exception into a long traceback."""

    message: str
    bad_image: str | None = None  # the image file, if it could not be read


class DetectionDataset(Dataset[Any]):
    """Samples of one or several image sets, after the sample transforms, by (epoch, sample index).

    With `flip` every image has two samples: i as it is, i + n mirrored. Without `keep_empty` images that have no box
    to train on are left out.

    Raises ValueError for a negative seed, for image sets of different classes, and if no image is left.
    """

    def __init__(
        self,
        indexes: Sequence[CocoIndex],
        transform: Sequence[Any],
        *,
        seed: int = 0,
        flip: bool = False,
        keep_empty: bool = False,
    ) -> None:
        if seed < 0:
            raise ValueError(f"General.seed: expected 0 or more, got {seed}")
        _check_same_classes(indexes)
        self.indexes = list(indexes)
        self.transform = list(transform)
        self.seed = seed
        self.flip = flip
        kept = [np.flatnonzero(index.has_box | keep_empty) for index in indexes]
        if not any(len(rows) for rows in kept):
            raise ValueError(_no_image_left(indexes))
        self._source = np.repeat(np.arange(len(kept)), [len(rows) for rows in kept])  # (images,) position in indexes
        self._row = np.concatenate(kept)  # (images,) row of that index
        portrait = [(index.height >= index.width)[rows] for index, rows in zip(indexes, kept, strict=True)]
        self.portrait = np.tile(np.concatenate(portrait), 2 if flip else 1)  # (samples,) bool: height >= width

    @property
    def num_image(self) -> int:
        return len(self._row)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.indexes[0].class_names

    def __len__(self) -> int:
        return self.num_image * (2 if self.flip else 1)

    def __getitem__(self, key: Key) -> Record | Failure:
        epoch, sample = key
        record = self.record(epoch, sample)
        try:
            for transform in self.transform:
                transform.apply(record)
        except (ValueError, OSError) as error:
            path = record["image_path"]
            message = str(error) if path in str(error) else f"{path}: {error}"
            return Failure(message, bad_image=None if "image" in record else path)
        except Exception as error:
            error.add_note(f"This happened while preparing {record['image_path']}.")
            raise
        return record

    def record(self, epoch: int, sample: int) -> Record:
        """Return the record of a sample before its transforms."""
        i = sample % self.num_image
        index, row = self.indexes[self._source[i]], int(self._row[i])
        return {
            "im_id": np.array(index.image_id[row], np.int64),
            "image_path": index.image_path(row),
            "h": int(index.height[row]),
            "w": int(index.width[row]),
            "gt_bbox": index.gt_bbox(row),
            "flipped": sample >= self.num_image,
            "rng": np.random.default_rng((self.seed, epoch, 1 + sample)),  # (seed, epoch, 0) shuffles the epoch
        }


def _check_same_classes(indexes: Sequence[CocoIndex]) -> None:
    for index in indexes[1:]:
        first = indexes[0]
        if (index.category_ids, index.class_names) != (first.category_ids, first.class_names):
            raise ValueError(
                f"DatasetParam.image_set: {first.image_set.name} and {index.image_set.name} have different "
                f"categories: {first.class_names[:5]}... and {index.class_names[:5]}..., or other ids; "
                f"name image sets with the same 'categories' list"
            )


def _no_image_left(indexes: Sequence[CocoIndex]) -> str:
    reasons = []
    for index in indexes:
        reason = "no box to train on" if index.has_annotation else "no annotations in its json"
        reasons.append(f"{index.image_set.name}: {index.num_image} images, {reason}")
    return (
        f"DatasetParam.image_set: no image is left. {'; '.join(reasons) or 'no image set is named'}; name an "
        f"image set with images and, to train, boxes that are no crowds, lie inside their image and have an area"
    )
