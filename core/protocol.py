"""The protocol between the training loop or the test and an engine, which torch and MXNet each implement.

L losses of the train graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from config.schema import Config
    from core.distributed.process_group import ProcessGroup
    from core.engine.precision import LossScaleState, Precision
    from core.engine.schedule import LrSchedule
    from core.weights.checkpoint import Checkpoint
    from models.record import Batch

EngineName = Literal["torch", "mxnet"]


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one training step, still on the device."""

    step: int
    lr: float
    files: list[str]
    values: Tensor  # (L + 1,) the losses and the gradient norm
    found_inf: Tensor | None = None  # bool (): the update was skipped, as a gradient overflowed under the loss scale
    notes: list[str] = field(default_factory=list)  # lines for the log


class Trainer(Protocol):
    """A network, its optimizer and its schedule, ready for the first step."""

    @property
    def config(self) -> Config: ...
    @property
    def device(self) -> torch.device:
        """The device that batches are transformed on."""
        ...

    @property
    def group(self) -> ProcessGroup: ...
    @property
    def schedule(self) -> LrSchedule: ...
    @property
    def metrics(self) -> Sequence[tuple[Any, slice]]:
        """The metrics, each with the span of its outputs among the graph's."""
        ...

    @property
    def compute_dtype(self) -> Precision: ...
    def step(self, batches: Sequence[Batch], step: int) -> StepRecord:
        """Make one update of the weights from all batches of this process."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """Return parameters and auxiliary states by name, as a checkpoint stores them."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the state of the optimizer and the loss scale, as a checkpoint stores it."""
        ...

    def loss_scale(self) -> LossScaleState | None:
        """Return the state of the loss scale, read from the device; None without one."""
        ...

    def describe(self) -> list[str]:
        """Return the back end, precision and recomputation of a step, as lines for the log."""
        ...


class Engine(Protocol):
    """A back end that trains and tests the graphs of a config."""

    def num_process(self, config: Config, is_train: bool) -> int:
        """Return the number of processes of this machine that train, or test, together."""
        ...

    def require_processes(self, config: Config) -> None:
        """Raise ValueError if the number of launched processes differs from the config's."""
        ...

    def select_device(self, config: Config, is_train: bool) -> torch.device:
        """Return the device on which this process transforms its batches. Raises ValueError for a missing GPU."""
        ...

    def build(
        self,
        config: Config,
        device: torch.device,
        iter_per_epoch: int,
        start: Checkpoint | None,
        group: ProcessGroup,
    ) -> AbstractContextManager[tuple[Trainer, list[str]]]:
        """Return a context that yields the trainer, with its first weights, and lines for the log."""
        ...

    def build_detector(
        self, config: Config, weights: Mapping[str, Tensor], device: torch.device, source: str | Path
    ) -> tuple[Callable[..., Sequence[Tensor]], list[str]]:
        """Return the test graph with these weights, a callable from inputs by name to outputs, and lines to print.

        source: the file of the weights, for the ValueError where they are another network's.
        """
        ...
