"""Reading of a batch from its samples, in a loader worker or in the training process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from core.data.dataset import DetectionDataset, Failure
from core.data.sample_order import Shard
from models.record import Batch, Record

_SHOWN = 3  # image files that an error names, at most


@dataclass(frozen=True)
class SkipBadImages:
    """DatasetParam.bad_image = "skip": a sample whose image cannot be read is replaced by another."""

    limit: int  # bad image files per process
    spares: Callable[[int, int], list[int]]  # (epoch, sample) to the samples that may replace it, best first


class BatchReader(Dataset[Any]):
    """Batches, as documented in `core.data.loader`, by Shard. Without `skip` a bad image is a Failure."""

    def __init__(self, dataset: DetectionDataset, skip: SkipBadImages | None = None) -> None:
        self.dataset = dataset
        self.skip = skip

    def __getitem__(self, shard: Shard) -> Batch | Failure:
        skipped: dict[str, str] = {}
        records: list[Record] = []
        for sample in shard.samples or [shard.like]:
            record = self._read(shard.epoch, sample, skipped)
            if isinstance(record, Failure):
                return record
            records.append(record)
        if (problem := _mixed_shapes(records)) is not None:
            return Failure(problem)
        batch: dict[str, Any] = {**collate(records)}
        if not shard.samples:
            batch = {name: value[:0] for name, value in batch.items()}
        return cast(Batch, batch | {"skipped": list(skipped.items())})

    def _read(self, epoch: int, sample: int, skipped: dict[str, str]) -> Record | Failure:
        """Return the record of the sample, or of its replacement. Files that cannot be read are added to `skipped`."""
        record = self.dataset[epoch, sample]
        if self.skip is None:
            return record
        spares: Iterator[int] | None = None
        while isinstance(record, Failure) and record.bad_image is not None:
            skipped[record.bad_image] = record.message
            if len(skipped) > self.skip.limit:
                return Failure(too_many_bad_images(skipped, self.skip.limit))
            spares = spares or iter(self.skip.spares(epoch, sample))
            spare = next(spares, None)
            if spare is None:
                return Failure(f"no sample is left to replace an image that cannot be read: {record.message}")
            record = self.dataset[epoch, spare]
        return record


def too_many_bad_images(skipped: Mapping[str, str], limit: int) -> str:
    """Return the error for more bad images, {path: problem}, than may be skipped."""
    last = "; ".join(list(skipped.values())[-_SHOWN:])
    return (
        f"DatasetParam.bad_image_limit: {len(skipped)} image files could not be read, more than {limit}; the last: "
        f"{last}. Check the disk of the images, fetch them again, or raise the limit"
    )


def collate(records: Sequence[Record]) -> Batch:
    """Return records whose arrays have equal shapes as a batch: arrays are stacked to tensors, paths become files."""
    arrays = [name for name, value in records[0].items() if isinstance(value, np.ndarray)]
    stacked = {name: torch.from_numpy(np.stack(_column(records, name))) for name in arrays}
    return cast(Batch, {"files": [record["image_path"] for record in records], **stacked})


def _column(records: Sequence[Record], name: str) -> list[np.ndarray]:
    return [record[name] for record in records]  # type: ignore[literal-required]


def _mixed_shapes(records: Sequence[Record]) -> str | None:
    """Return the problem with records whose arrays have different shapes."""
    for name, first in records[0].items():
        shapes = {value.shape for value in _column(records, name)} if isinstance(first, np.ndarray) else set()
        if len(shapes) > 1:
            return (
                f"{', '.join(record['image_path'] for record in records)}: {name!r} has the shapes {sorted(shapes)} "
                "in one batch; the last sample transform should be Pad2DImageBbox"
            )
    return None
