"""Batches of records. Which samples a batch holds, and what happens to them, follows from (seed, epoch,
index) alone, so neither the number of processes or workers nor a restart changes anything.

N images of a batch, H x W the input's sides, G rows of gt_bbox. A batch is a dict: image (N, H, W, 3) uint8,
im_info (N, 3) float32, gt_bbox (N, G, 5) float32, im_id (N,) int64, files (list of N paths), skipped (list of
(path, what is wrong) of image files that others stand in for, each file once). N is 0 where an epoch's last step
has fewer images than there are processes.
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
from core.data.batch_reader import BatchReader, SkipBadImages, too_many
from core.data.coco_index import open_index
from core.data.dataset import DetectionDataset, Failure
from core.data.sample_order import Part, Position, epoch_batches, ordered_batches, part_of, spare_samples
from core.run.parent_process import end_with
from core.weights.checkpoint import Progress
from models.record import Batch
from operator_cxx.build import usable_cpus

if TYPE_CHECKING:
    from config.schema import Config


class TrainLoader:
    """The training batches of one of `size` processes, up to the end of epoch `end_epoch` (None: without end).

    A step takes `accumulate` batches of `batch_image` images in each process; all processes together see every sample
    of an epoch once. It starts at `start`, also in the middle of an epoch: with the images per step that were used
    before, it gives exactly the batches that would have come; with another number of them, the rest of the epoch in
    batches of the new size. Steps are counted so that an epoch ends at a multiple of `iter_per_epoch` in any case.

    With a `bad_image_limit` other images stand in for those that cannot be read, for up to so many files.
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
        size: int = 1,
        start: Position = Position(),  # noqa: B008 (it is immutable)
        end_epoch: int | None = None,
        bad_image_limit: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        assert 0 <= rank < size
        self.dataset = dataset
        self.step_image = batch_image * accumulate * size  # of all processes
        self.accumulate = accumulate
        self.num_worker = num_worker
        self.pin_memory = pin_memory
        self.rank = rank
        self.size = size
        self.start = start
        self._portrait = None if square else dataset.portrait
        self._skip = None if bad_image_limit is None else SkipBadImages(bad_image_limit, self._spares)
        self.iter_per_epoch = len(self._batches(Position()))
        self.end_step = sys.maxsize if end_epoch is None else end_epoch * self.iter_per_epoch

    def __iter__(self) -> Generator[Batch]:
        return _read(BatchReader(self.dataset, self._skip), self._parts(), self.num_worker, self.pin_memory)

    @property
    def start_step(self) -> int:
        """The number of the first step: as many are left to the epoch's end as its remaining samples need."""
        return (self.start.epoch + 1) * self.iter_per_epoch - len(self._batches(self.start))

    def position_at(self, step: int) -> Position:
        """Where step `step`, of those from `start` on, begins: what a checkpoint after `step` steps stores."""
        epoch, inside = divmod(step, self.iter_per_epoch)
        begin = self._begin(epoch)
        batches = self._batches(begin)
        taken = inside - (self.iter_per_epoch - len(batches))  # those before `start` are in `begin`
        assert taken >= 0, f"step {step} comes before step {self.start_step}, the first one"
        samples = np.concatenate([np.empty(0, np.int64), *batches[:taken]])
        portrait = 0 if self._portrait is None else int(self._portrait[samples].sum())
        return Position(epoch, begin.sample + len(samples), begin.portrait + portrait)

    def _begin(self, epoch: int) -> Position:
        return self.start if epoch == self.start.epoch else Position(epoch)

    def _batches(self, begin: Position) -> list[np.ndarray]:
        """The samples of each step of an epoch's rest."""
        num_sample, done = len(self.dataset), (begin.sample, begin.portrait)
        return epoch_batches(self.dataset.seed, begin.epoch, num_sample, self.step_image, self._portrait, done)

    def _spares(self, epoch: int, sample: int) -> list[int]:
        num_sample = len(self.dataset)
        return spare_samples(self.dataset.seed, epoch, num_sample, self.step_image, self._portrait, sample)

    def _parts(self) -> Iterator[Part]:
        step = self.start_step
        for epoch in count(self.start.epoch):
            for samples in self._batches(self._begin(epoch)):
                if step >= self.end_step:
                    return
                for number in range(self.accumulate):  # as if each were a process of its own
                    yield part_of(epoch, samples, self.rank * self.accumulate + number, self.size * self.accumulate)
                step += 1


class TestLoader:
    """Every image once, in the image set's order; portrait images first where the input is not square.

    Of several processes each takes whole batches, by turns: an image is computed in the same batch, to the same bits,
    however many there are.
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
        size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.num_worker = num_worker
        self.pin_memory = pin_memory
        self.rank = rank
        self.size = size
        self._batches = ordered_batches(len(dataset), batch_image, None if square else dataset.portrait)
        self._order = np.concatenate(self._batches)

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self._batches[self.rank :: self.size])

    def __iter__(self) -> Generator[Batch]:
        parts = [part_of(0, samples, rank=0, size=1) for samples in self._batches[self.rank :: self.size]]
        return _read(BatchReader(self.dataset), parts, self.num_worker, self.pin_memory)

    def sample_at(self, place: int) -> int:
        """The sample at a place of the order of one process."""
        return int(self._order[place])

    def places(self, rank: int) -> list[int]:
        """The places, in the order of one process, of the images that process `rank` reads."""
        starts = np.cumsum([0, *map(len, self._batches)])
        turns = range(rank, len(self._batches), self.size)
        return [place for turn in turns for place in range(starts[turn], starts[turn + 1])]


def make_train_loader(
    config: Config, rank: int = 0, size: int = 1, num_device: int = 1, start: Progress | None = None
) -> TrainLoader:
    """Return the training batches of General.batch_image images for one of an experiment's processes and its devices.

    start: the progress of the checkpoint to resume from. Raises what `open_index` and `DetectionDataset` raise, and
    ValueError for a checkpoint of other samples or another seed.
    """
    data = config.DatasetParam
    required = data.bad_image != "skip"  # otherwise those that are missing are skipped like the others
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
        num_worker=config.General.loader_worker,
        accumulate=config.OptimizeParam.accumulate * num_device,
        rank=rank,
        size=size,
        bad_image_limit=data.bad_image_limit if data.bad_image == "skip" else None,
        start=Position() if start is None else Position(start.epoch, start.sample, start.portrait),
        end_epoch=config.OptimizeParam.schedule.end_epoch,
        pin_memory=_pins_memory(config),
    )


def make_test_loader(config: Config, image_set: str | ImageSet, rank: int = 0, size: int = 1) -> TestLoader:
    """All images of one image set, TestParam.batch_image at a time, by config.test_transform; of several processes
    those of one. An image that cannot be read is an error: without it the AP would be another one.

    Raises what `open_index` and `DetectionDataset` raise.
    """
    index = open_index(resolve(image_set, config.DatasetParam.data_root))
    return TestLoader(
        DetectionDataset([index], config.test_transform.sample, keep_empty=True),
        batch_image=config.TestParam.batch_image,
        square=config.ResizeParam.short == config.ResizeParam.long,
        num_worker=config.General.loader_worker,
        rank=rank,
        size=size,
        pin_memory=_pins_memory(config),
    )


def _pins_memory(config: Config) -> bool:
    """Whether batches go to a GPU. On a CPU run pinning would start a CUDA context for nothing."""
    return bool(config.KvstoreParam.gpus) and torch.cuda.is_available()


def _read(reader: BatchReader, parts: Iterable[Part], num_worker: int, pin_memory: bool) -> Generator[Batch]:
    """Raises ValueError, naming the image file, for the first sample that could not be prepared, and where more image
    files were skipped than may be."""
    loader = DataLoader(
        reader,
        batch_size=None,  # the reader gives whole batches
        sampler=parts,
        collate_fn=_as_it_is,
        num_workers=min(num_worker, usable_cpus()),  # torch warns of more than there are cores
        worker_init_fn=partial(_init_worker, os.getpid()),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # of its own: the workers' unused seeds shall not come from the model's
    )
    told: dict[str, str] = {}  # a bad file comes again with the next epoch, and with its mirrored sample
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, Failure):
                raise ValueError(batch.message)
            batch["skipped"] = [(path, wrong) for path, wrong in batch["skipped"] if path not in told]
            told.update(batch["skipped"])
            if reader.skip is not None and len(told) > reader.skip.limit:
                raise ValueError(too_many(told, reader.skip.limit))
            yield batch
    finally:
        # a traceback may keep the iterator alive, and at its end Python would wait for workers that ignore SIGTERM
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def _init_worker(parent: int, worker: int) -> None:
    cv2.setNumThreads(0)  # the workers are the threads
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach all processes; the training process answers
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)  # torch's own watch misses a training process that is killed while its workers start


def _as_it_is(batch: Any) -> Any:
    return batch
