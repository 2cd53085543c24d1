"""BatchNorm's moving statistics in a step of several batches (gradient accumulation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

A = TypeVar("A", bound=Any)  # an array of the engine: torch.Tensor or mx.nd.NDArray


class MovingStatistics(Generic[A]):
    """Moving means and variances of a step: each batch updates those at the start of the step, and the step ends with
    the mean of the results, as with one process per batch.

    read returns copies of all statistics, write sets them. keep: whether those at the start are needed again.
    """

    def __init__(self, read: Callable[[], list[A]], write: Callable[[Sequence[A]], None], keep: bool) -> None:
        self._read = read
        self._write = write
        self.start = read() if keep else []
        self._sum: list[A] = []
        self._num = 0

    def restart(self) -> None:
        """Restore the statistics at the start of the step, before the next batch."""
        self._write(self.start)

    def add(self) -> None:
        """Add the current statistics, after a batch, to the mean."""
        now = self._read()
        self._sum = [total + value for total, value in zip(self._sum, now, strict=True)] if self._sum else now
        self._num += 1

    def set_mean(self) -> None:
        """Set the statistics to the mean over the batches that were added."""
        self._write([total / self._num for total in self._sum])
