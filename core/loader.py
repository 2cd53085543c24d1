"""Batches of records. Which samples a batch holds, and what happens to them, follows from (seed, epoch,
index) alone, so neither the number of worker processes nor a restart changes anything.

N images of a batch, H x W the input's sides, G rows of gt_bbox. A batch is a dict: image (N, H, W, 3) uint8,
im_info (N, 3) float32, gt_bbox (N, G, 5) float32, im_id (N,) int64, files (list of N paths).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from core.coco_index import open_index
from core.dataset import DetectionDataset, Failure, Key
from core.detection_input import Record
from core.image_set import ImageSet, resolve

if TYPE_CHECKING:
    from config.schema import Config

Batch = dict[str, Any]


def epoch_batches(
    seed: int, epoch: int, num_sample: int, batch: int, portrait: np.ndarray | None = None
) -> list[np.ndarray]:
    """The samples of each batch of a training epoch, every sample once, shuffled over the whole set.

    With `portrait` (num_sample,) bool, a batch holds one orientation, and the order of the batches is
    shuffled too. The last batch (of each orientation) may be smaller.
    """
    rng = np.random.default_rng((seed, epoch, 0))
    order = rng.permutation(num_sample)
    if portrait is None:
        return _chunks(order, batch)
    batches = _chunks(order[portrait[order]], batch) + _chunks(order[~portrait[order]], batch)
    return [batches[i] for i in rng.permutation(len(batches))]


def ordered_batches(num_sample: int, batch: int, portrait: np.ndarray | None = None) -> list[np.ndarray]:
    """The samples of each batch, in order; with `portrait` (num_sample,) bool, portrait images come first."""
    order = np.arange(num_sample)
    if portrait is None:
        return _chunks(order, batch)
    return _chunks(order[portrait], batch) + _chunks(order[~portrait], batch)


class TrainLoader:
    """Training batches from step `start_step` up to `end_step` (None: without end), across epochs.

    A start in the middle of an epoch gives exactly the batches that would have come.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        batch_image: int,
        square: bool,
        num_worker: int,
        start_step: int = 0,
        end_step: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_image = batch_image
        self.num_worker = num_worker
        self.start_step = start_step
        self.end_step = end_step
        self._portrait = None if square else dataset.portrait
        self.iter_per_epoch = len(self._batches(epoch=0))

    def __iter__(self) -> Iterator[Batch]:
        return _read(self.dataset, self._keys(), self.num_worker)

    def _batches(self, epoch: int) -> list[np.ndarray]:
        return epoch_batches(self.dataset.seed, epoch, len(self.dataset), self.batch_image, self._portrait)

    def _keys(self) -> Iterator[list[Key]]:
        step = self.start_step
        for epoch in count(step // self.iter_per_epoch):
            for samples in self._batches(epoch)[step % self.iter_per_epoch :]:
                if step == self.end_step:
                    return
                yield [(epoch, int(sample)) for sample in samples]
                step += 1


class TestLoader:
    """Every image once, in the image set's order; portrait images first where the input is not square."""

    __test__ = False  # not pytest's

    def __init__(self, dataset: DetectionDataset, *, batch_image: int, square: bool, num_worker: int) -> None:
        self.dataset = dataset
        self.num_worker = num_worker
        self._batches = ordered_batches(len(dataset), batch_image, None if square else dataset.portrait)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        keys = [[(0, int(sample)) for sample in samples] for samples in self._batches]
        return _read(self.dataset, keys, self.num_worker)


def make_train_loader(config: Config) -> TrainLoader:
    """The training batches of an experiment: General.batch_image images for each device and step.

    Raises what `open_index` and `DetectionDataset` raise.
    """
    data = config.DatasetParam
    indexes = [open_index(resolve(image_set, data.data_root)) for image_set in data.image_set]
    dataset = DetectionDataset(indexes, config.transform.sample, seed=config.General.seed, flip=data.flip)
    return TrainLoader(
        dataset,
        batch_image=config.General.batch_image * max(1, len(config.KvstoreParam.gpus)),
        square=config.ResizeParam.short == config.ResizeParam.long,
        num_worker=config.General.loader_worker,
    )


def make_test_loader(config: Config, image_set: str | ImageSet) -> TestLoader:
    """All images of one image set, TestParam.batch_image at a time, by config.test_transform.

    Raises what `open_index` and `DetectionDataset` raise.
    """
    index = open_index(resolve(image_set, config.DatasetParam.data_root))
    return TestLoader(
        DetectionDataset([index], config.test_transform.sample, keep_empty=True),
        batch_image=config.TestParam.batch_image,
        square=config.ResizeParam.short == config.ResizeParam.long,
        num_worker=config.General.loader_worker,
    )


def _read(dataset: DetectionDataset, keys: Iterable[list[Key]], num_worker: int) -> Iterator[Batch]:
    """Raises ValueError, naming the image file, for the first sample that could not be prepared."""
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=_collate,
        num_workers=min(num_worker, num_cpu()),  # torch warns of more than there are cores
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of its own: the workers' unused seeds shall not come from the model's
    )
    for batch in loader:
        if isinstance(batch, Failure):
            raise ValueError(batch.message)
        yield batch


def num_cpu() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _init_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # the workers are the threads
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach all processes; the training process answers
        signal.signal(number, signal.SIG_IGN)


def _collate(records: list[Record | Failure]) -> Batch | Failure:
    done: list[Record] = []
    for record in records:
        if isinstance(record, Failure):
            return record
        done.append(record)
    batch: Batch = {"files": [record["image_path"] for record in done]}
    for name, value in done[0].items():
        if isinstance(value, np.ndarray):
            shapes = {record[name].shape for record in done}
            if len(shapes) > 1:
                return Failure(
                    f"{', '.join(batch['files'])}: {name!r} has the shapes {sorted(shapes)} in one batch; "
                    f"the last sample transform should be Pad2DImageBbox"
                )
            batch[name] = torch.from_numpy(np.stack([record[name] for record in done]))
    return batch


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]
