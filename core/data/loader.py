"""Batches of records for training and testing. The samples of a batch and their augmentation are a function of
(seed, epoch, index) alone: the number of processes or workers and a resume change nothing.

N images of a batch, H x W the input's sides, G rows of gt_bbox. A batch is a dict: image (N, H, W, 3) uint8,
im_info (N, 3) float32, gt_bbox (N, G, 5) float32, im_id (N,) int64, files (list of N paths), skipped (list of
(path, problem) of image files that were replaced by others, each file once). N is 0 if an epoch's last step has
fewer images than there are processes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from config.image_set import ImageSet, resolve
from core.data.batch_reader import BatchReader, SkipBadImages, too_many_bad_images
from core.data.coco_index import open_index
from core.data.dataset import DetectionDataset, Failure
from core.data.sample_order import Position, Shard, epoch_batches, ordered_batches, shard_of, spare_samples
from core.run.parent_process import exit_with_parent
from core.weights.checkpoint import Progress
from models.record import Batch
from operator_cxx.build import usable_cpus

if TYPE_CHECKING:
    from config.schema import Config


MAX_WORKER = 4  # of the default: each has two batches in memory


class TrainLoader:
    """Training batches of rank `rank` of `world_size`, up to the end of epoch `end_epoch` (None: without end).

    A step takes `accumulate` batches of `batch_image` images on each rank; all ranks together see every sample of an
    epoch once. It can start in the middle of an epoch (`start`): with an unchanged global batch size it yields exactly
    the remaining batches; with another one, the rest of the epoch in batches of the new size. Steps are counted so that
    an epoch always ends at a multiple of `iter_per_epoch`.

    With a `bad_image_limit`, up to that number of image files that cannot be read are replaced by others.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        batch_image: int,
        square: bool,
        num_worker: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start: Position = Position(),  # noqa: B008 (it is immutable)
        end_epoch: int | None = None,
        bad_image_limit: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        assert 0 <= rank < world_size
        self.dataset = dataset
        self.global_batch_size = batch_image * accumulate * world_size
        self.accumulate = accumulate
        self.num_worker = num_worker
        self.pin_memory = pin_memory
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self._portrait = None if square else dataset.portrait
        self._skip = None if bad_image_limit is None else SkipBadImages(bad_image_limit, self._spares)
        self.iter_per_epoch = len(self._batches(Position()))
        self.end_step = sys.maxsize if end_epoch is None else end_epoch * self.iter_per_epoch

    def __iter__(self) -> Generator[Batch]:
        return _read(BatchReader(self.dataset, self._skip), self._shards(), self.num_worker, self.pin_memory)

    @property
    def start_step(self) -> int:
        """The number of the first step, such that the steps left in the epoch fit its remaining samples."""
        return (self.start.epoch + 1) * self.iter_per_epoch - len(self._batches(self.start))

    def position_at(self, step: int) -> Position:
        """Return the position at which step `step` starts, as a checkpoint after `step` steps stores it."""
        epoch, inside = divmod(step, self.iter_per_epoch)
        start = self._epoch_start(epoch)
        batches = self._batches(start)
        taken = inside - (self.iter_per_epoch - len(batches))  # `start` counts the samples of the steps before
        assert taken >= 0, f"step {step} comes before step {self.start_step}, the first one"
        samples = np.concatenate([np.empty(0, np.int64), *batches[:taken]])
        portrait = 0 if self._portrait is None else int(self._portrait[samples].sum())
        return Position(epoch, start.sample + len(samples), start.portrait + portrait)

    def _epoch_start(self, epoch: int) -> Position:
        return self.start if epoch == self.start.epoch else Position(epoch)

    def _batches(self, start: Position) -> list[np.ndarray]:
        """Return the samples of each remaining step of an epoch."""
        num_sample, done = len(self.dataset), (start.sample, start.portrait)
        return epoch_batches(self.dataset.seed, start.epoch, num_sample, self.global_batch_size, self._portrait, done)

    def _spares(self, epoch: int, sample: int) -> list[int]:
        num_sample = len(self.dataset)
        return spare_samples(self.dataset.seed, epoch, num_sample, self.global_batch_size, self._portrait, sample)

    def _shards(self) -> Iterator[Shard]:
        step, num_shard = self.start_step, self.world_size * self.accumulate
        for epoch in count(self.start.epoch):
            for samples in self._batches(self._epoch_start(epoch)):
                if step >= self.end_step:
                    return
                for number in range(self.accumulate):  # each batch is sharded like that of a separate rank
                    yield shard_of(epoch, samples, self.rank * self.accumulate + number, num_shard)
                step += 1


class TestLoader:
    """Every image once, in the image set's order; portrait images first if the input is not square.

    Whole batches are dealt to the ranks in turn: an image is computed in the same batch, to the same bits, with any
    number of them.
    """

    __test__ = False  # not pytest's

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        batch_image: int,
        square: bool,
        num_worker: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.num_worker = num_worker
        self.pin_memory = pin_memory
        self.rank = rank
        self.world_size = world_size
        self._batches = ordered_batches(len(dataset), batch_image, None if square else dataset.portrait)
        self._order = np.concatenate(self._batches)

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(self._batches[self.rank :: self.world_size])

    def __iter__(self) -> Generator[Batch]:
        shards = [shard_of(0, samples, 0, 1) for samples in self._batches[self.rank :: self.world_size]]
        return _read(BatchReader(self.dataset), shards, self.num_worker, self.pin_memory)

    def sample_at(self, position: int) -> int:
        """Return the sample at a position in the order of a single process."""
        return int(self._order[position])

    def positions(self, rank: int) -> list[int]:
        """Return the positions, in the order of a single process, of the images that `rank` reads."""
        starts = np.cumsum([0, *map(len, self._batches)])
        batches = range(rank, len(self._batches), self.world_size)
        return [position for batch in batches for position in range(starts[batch], starts[batch + 1])]


def make_train_loader(
    config: Config, rank: int = 0, world_size: int = 1, num_device: int = 1, start: Progress | None = None
) -> TrainLoader:
    """Return the training batches of General.batch_image images for one rank, which has `num_device` devices.

    start: the progress of the checkpoint to resume from. Raises what `open_index` and `DetectionDataset` raise, and
    ValueError for a checkpoint of other samples or another seed.
    """
    data = config.DatasetParam
    required = data.bad_image != "skip"  # otherwise missing images are skipped like damaged ones
    indexes = [open_index(resolve(one, data.data_root), require_images=required) for one in data.image_set]
    dataset = DetectionDataset(indexes, config.transform.sample, seed=config.General.seed, flip=data.flip)
    if start is not None and (start.num_sample, start.seed) != (len(dataset), dataset.seed):
        raise ValueError(
            f"the checkpoint was trained with {start.num_sample} samples per epoch and seed {start.seed}; now an "
            f"epoch has {len(dataset)} samples and the seed is {dataset.seed}: resume with the images and the seed "
            "that it was trained with"
        )
    return TrainLoader(
        dataset,
        batch_image=config.General.batch_image,
        square=config.ResizeParam.short == config.ResizeParam.long,
        num_worker=num_worker(config),
        accumulate=config.OptimizeParam.accumulate * num_device,
        rank=rank,
        world_size=world_size,
        bad_image_limit=data.bad_image_limit if data.bad_image == "skip" else None,
        start=Position() if start is None else Position(start.epoch, start.sample, start.portrait),
        end_epoch=config.OptimizeParam.schedule.end_epoch,
        pin_memory=_pins_memory(config),
    )


def make_test_loader(config: Config, image_set: str | ImageSet, rank: int = 0, world_size: int = 1) -> TestLoader:
    """Return the test batches of TestParam.batch_image images of an image set for one rank, by config.test_transform.

    An image that cannot be read is an error: leaving it out would change the AP. Raises what `open_index` and
    `DetectionDataset` raise.
    """
    index = open_index(resolve(image_set, config.DatasetParam.data_root))
    return TestLoader(
        DetectionDataset([index], config.test_transform.sample, keep_empty=True),
        batch_image=config.TestParam.batch_image,
        square=config.ResizeParam.short == config.ResizeParam.long,
        num_worker=num_worker(config),
        rank=rank,
        world_size=world_size,
        pin_memory=_pins_memory(config),
    )


def num_worker(config: Config) -> int:
    """Return General.loader_worker; by default the cores of this process's share of the machine, 1 to 4."""
    if config.General.loader_worker is not None:
        return config.General.loader_worker
    return min(max(usable_cpus() // config.KvstoreParam.devices_per_machine, 1), MAX_WORKER)


def _pins_memory(config: Config) -> bool:
    """Return True if batches go to a GPU: in a CPU run, pinning would create a CUDA context that nothing uses."""
    return bool(config.KvstoreParam.gpus) and torch.cuda.is_available()


def _read(reader: BatchReader, shards: Iterable[Shard], num_worker: int, pin_memory: bool) -> Generator[Batch]:
    """Yield the batches of the shards. Raises ValueError, naming the image file, for the first sample that could not be
    prepared, and if more image files were skipped than the limit allows."""
    loader = DataLoader(
        reader,
        batch_size=None,  # the reader returns whole batches
        sampler=shards,
        collate_fn=_identity,
        num_workers=min(num_worker, usable_cpus()),  # torch warns about more workers than cores
        worker_init_fn=partial(_init_worker, os.getpid()),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # drawing the workers' unused seeds must not advance the global generator
    )
    reported: dict[str, str] = {}  # a bad file recurs in the next epoch, and in its mirrored sample
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, Failure):
                raise ValueError(batch.message)
            batch["skipped"] = [(path, problem) for path, problem in batch["skipped"] if path not in reported]
            reported.update(batch["skipped"])
            if reader.skip is not None and len(reported) > reader.skip.limit:
                raise ValueError(too_many_bad_images(reported, reader.skip.limit))
            yield batch
    finally:
        # a traceback may keep the iterator alive, and Python would wait at exit for workers that ignore SIGTERM
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def _init_worker(parent: int, worker: int) -> None:
    cv2.setNumThreads(0)  # the workers themselves run in parallel
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes; the training process handles them
        signal.signal(number, signal.SIG_IGN)
    exit_with_parent(parent)  # torch's watchdog misses a training process that is killed while its workers start


def _identity(batch: Any) -> Any:
    return batch
