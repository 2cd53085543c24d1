"""BatchNorm's moving means and variances over a step of several batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

A = TypeVar("A", bound=Any)  # an array of the engine: torch.Tensor or mx.nd.NDArray


class MovingStatistics(Generic[A]):
    """Each batch of a step moves the statistics of the step's start; the step ends with the mean of the results, as
    with one process per batch.

    read returns copies of all statistics, write sets them. keep: whether the step may have to return to its start.
    """

    def __init__(self, read: Callable[[], list[A]], write: Callable[[Sequence[A]], None], keep: bool) -> None:
        self._read = read
        self._write = write
        self.start = read() if keep else []
        self._sum: list[A] = []
        self._num = 0

    def restart(self) -> None:
        """Restore the statistics of the step's start, before the next batch."""
        self._write(self.start)

    def add(self) -> None:
        """Account for what a batch has made of them."""
        now = self._read()
        self._sum = [total + value for total, value in zip(self._sum, now, strict=True)] if self._sum else now
        self._num += 1

    def set_mean(self) -> None:
        """Set them to the mean over the batches that were added."""
        self._write([total / self._num for total in self._sum])
