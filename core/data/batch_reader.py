"""From the samples of a step to a batch, in whichever process reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from core.data.dataset import DetectionDataset, Failure
from core.data.sample_order import Part
from models.record import Batch, Record

_SHOWN = 3  # image files that an error names


@dataclass(frozen=True)
class SkipBadImages:
    """DatasetParam.bad_image = "skip": another sample stands in for one whose image cannot be read."""

    limit: int  # image files in a process
    spares: Callable[[int, int], list[int]]  # of (epoch, sample), best first


class BatchReader(Dataset[Any]):
    """Batches, as `core.data.loader` describes them; the keys are Parts. Without `skip` a bad image is a Failure."""

    def __init__(self, dataset: DetectionDataset, skip: SkipBadImages | None = None) -> None:
        self.dataset = dataset
        self.skip = skip

    def __getitem__(self, part: Part) -> Batch | Failure:
        skipped: dict[str, str] = {}
        records: list[Record] = []
        for sample in part.samples or [part.like]:
            record = self._read(part.epoch, sample, skipped)
            if isinstance(record, Failure):
                return record
            records.append(record)
        batch = _collate(records)
        if isinstance(batch, Failure):
            return batch
        if not part.samples:
            batch = {name: value[:0] for name, value in batch.items()}
        return cast(Batch, batch | {"skipped": list(skipped.items())})

    def _read(self, epoch: int, sample: int, skipped: dict[str, str]) -> Record | Failure:
        """The record of the sample, or of what stands in for it. Files that cannot be read are added to `skipped`."""
        record = self.dataset[epoch, sample]
        if self.skip is None:
            return record
        spares: Iterator[int] | None = None
        while isinstance(record, Failure) and record.bad_image is not None:
            skipped[record.bad_image] = record.message
            if len(skipped) > self.skip.limit:
                return Failure(too_many(skipped, self.skip.limit))
            spares = spares or iter(self.skip.spares(epoch, sample))
            spare = next(spares, None)
            if spare is None:
                return Failure(f"nothing is left to stand in for an image that cannot be read: {record.message}")
            record = self.dataset[epoch, spare]
        return record


def too_many(skipped: Mapping[str, str], limit: int) -> str:
    """The error for more bad images, {path: what is wrong}, than may be skipped."""
    last = "; ".join(list(skipped.values())[-_SHOWN:])
    return (
        f"DatasetParam.bad_image_limit: {len(skipped)} image files could not be read, more than {limit}; the last: "
        f"{last}. See whether the images' disk is there and whole, fetch them again, or raise the limit"
    )


def _collate(records: list[Record]) -> dict[str, Any] | Failure:
    batch: dict[str, Any] = {"files": [record["image_path"] for record in records]}
    for name, first in records[0].items():
        if isinstance(first, np.ndarray):
            values: list[np.ndarray] = [record[name] for record in records]  # type: ignore[literal-required]
            shapes = {value.shape for value in values}
            if len(shapes) > 1:
                return Failure(
                    f"{', '.join(batch['files'])}: {name!r} has the shapes {sorted(shapes)} in one batch; "
                    f"the last sample transform should be Pad2DImageBbox"
                )
            batch[name] = torch.from_numpy(np.stack(values))
    return batch
