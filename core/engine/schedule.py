"""The learning rate as a pure function of the step: linear warm-up, then steps down.

A step is one update of the weights; steps count from 0. Milestones and the length of the warm-up are given in
epochs (fractions are allowed) and turned into steps by rounding to the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from config.schema import Config


@dataclass(frozen=True, kw_only=True)
class LrSchedule:
    """Learning rate of a whole run.

    Raises:
        ValueError: no steps, or phases out of order: the warm-up, then the milestones, then the end.
    """

    lr: float
    iter_per_epoch: int
    end_epoch: int
    lr_epoch: tuple[float, ...]  # milestones: each multiplies the rate by lr_factor
    lr_factor: float
    warmup_epoch: float
    warmup_lr_factor: float  # the warm-up starts at warmup_lr_factor * lr

    def __post_init__(self) -> None:
        if self.iter_per_epoch < 1:
            raise ValueError(f"an epoch needs at least one step, got {self.iter_per_epoch}: are there images?")
        phases = (0, self.warmup_epoch, *self.lr_epoch, self.end_epoch)
        is_ordered = all(a < b for a, b in pairwise((*self.lr_epoch, self.end_epoch)))
        if not is_ordered or sorted(phases) != list(phases):
            raise ValueError(
                f"the phases of the schedule overlap: warm-up until epoch {self.warmup_epoch}, milestones at "
                f"{self.lr_epoch}, end at {self.end_epoch}; shorten OptimizeParam.warmup.epoch, move "
                "OptimizeParam.schedule.lr_epoch, or train longer"
            )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of update number `step`.

        The warm-up is linear from `warmup_lr_factor * lr` at step 0 to `lr` (Goyal et al. 2017,
        "Accurate, Large Minibatch SGD", section 2.2).
        """
        warmup_step = self._step_of(self.warmup_epoch)
        if step < warmup_step:
            return self.lr * (self.warmup_lr_factor + (1 - self.warmup_lr_factor) * step / warmup_step)
        reached = sum(step >= self._step_of(epoch) for epoch in self.lr_epoch)
        return self.lr * self.lr_factor**reached

    def describe(self) -> list[str]:
        """Return a line per phase for the log: epochs, steps and learning rate."""
        borders = sorted({0.0, float(self.warmup_epoch), *map(float, self.lr_epoch), float(self.end_epoch)})
        lines = []
        for start, end in pairwise(borders):
            first, last = self._step_of(start), self._step_of(end)
            rate = f"{self.lr_at(first):.6g}"
            if start < self.warmup_epoch:
                rate += f" to {self.lr:.6g} (warm-up)"
            span = f"epoch {start:g} to {end:g}, steps {first} to {last} ({last - first} iterations)"
            lines.append(f"{span}: lr {rate}")
        return lines

    def _step_of(self, epoch: float) -> int:
        return round(epoch * self.iter_per_epoch)


def build_schedule(config: Config, iter_per_epoch: int) -> LrSchedule:
    """Return the config's learning-rate schedule in steps."""
    optimize = config.OptimizeParam
    assert optimize.optimizer.lr is not None
    return LrSchedule(
        lr=optimize.optimizer.lr,
        iter_per_epoch=iter_per_epoch,
        end_epoch=optimize.schedule.end_epoch,
        lr_epoch=optimize.schedule.lr_epoch,
        lr_factor=optimize.schedule.lr_factor,
        warmup_epoch=optimize.warmup.epoch,
        warmup_lr_factor=optimize.warmup.lr_factor,
    )
