"""Samples of each step and of each rank: torch's DistributedSampler can neither resume in the middle of an epoch nor
batch by orientation.

The order is a function of (seed, epoch), the global batch size, and the number of samples taken from the epoch: a
different number of processes can resume in the middle of an epoch without repeating or skipping an image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Position(NamedTuple):
    """A point of the training, independent of the number of processes and the global batch size."""

    epoch: int = 0
    sample: int = 0  # samples of the epoch that were taken
    portrait: int = 0  # the number of portrait ones among them, if batches hold one orientation; else 0


class Shard(NamedTuple):
    """The samples of a step that one rank reads."""

    epoch: int
    samples: list[int]  # empty if an epoch's last step has fewer images than there are ranks
    like: int  # a sample of the step, with the shapes of this batch even if that has no images


def epoch_batches(
    seed: int,
    epoch: int,
    num_sample: int,
    batch: int,
    portrait: np.ndarray | None = None,
    done: tuple[int, int] = (0, 0),
) -> list[np.ndarray]:
    """Return the samples of each step of a training epoch, every sample once, shuffled over the whole set.

    With `portrait` (num_sample,) bool, each step holds one orientation: the samples of either orientation are batched
    in the order of the shuffle, and a step comes when its last sample does. The last step (of each orientation) may be
    smaller. `done` is `Position.sample` and `Position.portrait`; only the steps of the remaining samples are returned.
    """
    order = _shuffled(seed, epoch, num_sample)
    taken, taken_portrait = done
    if portrait is None:
        assert 0 <= taken <= num_sample
        return _chunks(order[taken:], batch)
    is_portrait = portrait[order]
    steps = _chunks(np.flatnonzero(is_portrait)[taken_portrait:], batch)  # positions in `order`
    steps += _chunks(np.flatnonzero(~is_portrait)[taken - taken_portrait :], batch)
    return [order[positions] for positions in sorted(steps, key=lambda positions: int(positions[-1]))]


def spare_samples(
    seed: int, epoch: int, num_sample: int, batch: int, portrait: np.ndarray | None, sample: int
) -> list[int]:
    """Return the samples that may replace a sample, best first: the epoch's other samples of its orientation.

    The first has the same position in the next step, and the others follow it: two samples of one step get different
    replacements, on whichever ranks they are.
    """
    order = _shuffled(seed, epoch, num_sample)
    group = order if portrait is None else order[portrait[order] == portrait[sample]]
    position = int(np.flatnonzero(group == sample)[0])
    following = np.roll(group, -(position + batch))
    return [int(spare) for spare in following if spare != sample]


def ordered_batches(num_sample: int, batch: int, portrait: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the samples of each batch, in order; with `portrait` (num_sample,) bool, portrait images come first."""
    order = np.arange(num_sample)
    if portrait is None:
        return _chunks(order, batch)
    return _chunks(order[portrait], batch) + _chunks(order[~portrait], batch)


def shard_of(epoch: int, samples: np.ndarray, rank: int, world_size: int) -> Shard:
    """Return the shard of `rank`: consecutive samples of the step, in numbers that differ by at most one."""
    return Shard(epoch, np.array_split(samples, world_size)[rank].tolist(), int(samples[0]))


def _shuffled(seed: int, epoch: int, num_sample: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, 0)).permutation(num_sample)


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]
