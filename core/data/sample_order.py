"""Which samples a step takes, and which of them each process reads.

All of it follows from (seed, epoch), the images of a step over all processes, and how far the epoch has come in
samples: so another number of processes may go on in the middle of an epoch without an image twice or left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Position(NamedTuple):
    """A place in the training, the same for every number of processes and images per step."""

    epoch: int = 0
    sample: int = 0  # samples of the epoch that were taken
    portrait: int = 0  # how many of them are portrait, where batches hold one orientation; else 0


class Part(NamedTuple):
    """What one process reads of a step's samples."""

    epoch: int
    samples: list[int]  # none where an epoch's last step has fewer images than there are processes
    like: int  # a sample of the step: it has the shapes of this batch, even of one without images


def epoch_batches(
    seed: int,
    epoch: int,
    num_sample: int,
    batch: int,
    portrait: np.ndarray | None = None,
    done: tuple[int, int] = (0, 0),
) -> list[np.ndarray]:
    """The samples of each step of a training epoch, every sample once, shuffled over the whole set.

    With `portrait` (num_sample,) bool, a step holds one orientation. Either orientation is taken in the order of the
    shuffle, and the steps come in the order in which they would fill up, were the samples dealt out one by one. The
    last step (of each orientation) may be smaller. `done` is `Position.sample` and `Position.portrait`: the steps are
    those of the samples that are left.
    """
    order = _shuffled(seed, epoch, num_sample)
    taken, taken_portrait = done
    if portrait is None:
        assert 0 <= taken <= num_sample
        return _chunks(order[taken:], batch)
    upright = portrait[order]
    places = _chunks(np.flatnonzero(upright)[taken_portrait:], batch)
    places += _chunks(np.flatnonzero(~upright)[taken - taken_portrait :], batch)
    return [order[filled] for filled in sorted(places, key=lambda filled: int(filled[-1]))]


def spare_samples(
    seed: int, epoch: int, num_sample: int, batch: int, portrait: np.ndarray | None, sample: int
) -> list[int]:
    """What may stand in for a sample, best first: the epoch's other samples, of its orientation.

    The first is in its place in the next step, the others follow that one: two samples of one step get different
    stand-ins, whichever process reads them.
    """
    order = _shuffled(seed, epoch, num_sample)
    group = order if portrait is None else order[portrait[order] == portrait[sample]]
    place = int(np.flatnonzero(group == sample)[0])
    following = np.roll(group, -(place + batch))
    return [int(spare) for spare in following if spare != sample]


def ordered_batches(num_sample: int, batch: int, portrait: np.ndarray | None = None) -> list[np.ndarray]:
    """The samples of each batch, in order; with `portrait` (num_sample,) bool, portrait images come first."""
    order = np.arange(num_sample)
    if portrait is None:
        return _chunks(order, batch)
    return _chunks(order[portrait], batch) + _chunks(order[~portrait], batch)


def part_of(epoch: int, samples: np.ndarray, rank: int, size: int) -> Part:
    """The part of process `rank` among `size`: neighbours, and of as equal numbers as can be."""
    return Part(epoch, np.array_split(samples, size)[rank].tolist(), int(samples[0]))


def _shuffled(seed: int, epoch: int, num_sample: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, 0)).permutation(num_sample)


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]
