"""A training step: batches in, an update of the weights out. L losses of the train graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import symbol as S
from core.checkpoint import Checkpoint, read_tensors
from core.device import place
from core.first_weights import load_first_weights
from core.gradients import GradientAverage
from core.loader import Batch
from core.optimizer import SGD, multipliers
from core.precision import LOSS_SCALE, LossScale, Precision, precision
from core.schedule import LrSchedule, build_schedule
from core.step_memory import plan_recompute
from core.world import ALONE, World
from symbol.memory import Plan
from symbol.passes import in_precision

if TYPE_CHECKING:
    from config.schema import Config


@dataclass(frozen=True)
class StepRecord:
    """A step, with numbers that are still on the device."""

    step: int
    lr: float
    files: list[str]
    values: Tensor  # (L + 1,) the losses and the gradient norm
    skipped: bool = False  # without an update: a gradient overflowed under the loss scale


@dataclass(frozen=True)
class Trainer:
    """What a training step needs."""

    config: Config
    device: torch.device
    module: nn.Module
    optimizer: SGD
    schedule: LrSchedule
    metrics: list[tuple[Any, slice]]  # each with the span of its outputs among the module's
    world: World = ALONE
    average: GradientAverage | None = None  # of several processes
    scale: LossScale | None = None  # in float16
    computed_in: Precision = "float32"
    plan: Plan | None = None  # what is computed again
    kvstore: None = None  # MXNet's

    def step(self, batches: Sequence[Batch], step: int) -> StepRecord:
        """One update from OptimizeParam.accumulate batches: as many processes with one batch each would make the same.

        What it computes stays on the device, and the losses are not waited for; with a loss scale one flag is. A step
        whose gradients are not finite under the scale leaves the weights and the statistics as they were.
        """
        transform_batches(self.config, batches)
        lr = self.schedule.lr_at(step)
        self.optimizer.zero_grad()
        statistics = _MovingStatistics(self.module, keep=len(batches) > 1 or self.scale is not None)
        losses = []
        for i, batch in enumerate(batches):
            if i:
                statistics.begin_again()
            if self.average is not None and i == len(batches) - 1:
                self.average.begin()
            losses.append(self._forward_backward(batch))
            if len(batches) > 1:
                statistics.add()
        if self.average is not None:
            self.average.finish()
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        factor = len(batches) * (self.scale.value if self.scale is not None else 1)
        if factor != 1:
            torch._foreach_mul_(gradients, 1 / factor)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        skipped = self.scale is not None and not bool(norm.isfinite())
        if self.scale is not None:
            self.scale.update(not skipped)
        if skipped:
            statistics.begin_again()
        else:
            self.optimizer.step(lr)
            statistics.finish(self.world if self.config.NormalizeParam.type == "localbn" else ALONE)
        mean = torch.stack(losses).mean(dim=0)  # (L,)
        files = [path for batch in batches for path in batch["files"]]
        return StepRecord(step, lr, files, torch.cat([mean, norm.reshape(1)]), skipped)

    def describe(self) -> list[str]:
        """How it computes, as lines for the log."""
        return [precision(self.config.General, self.device)[1], *([self.plan.describe()] if self.plan else [])]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the weights."""
        return self.optimizer.state_dict() | (self.scale.state_dict() if self.scale is not None else {})

    def _forward_backward(self, batch: Batch) -> Tensor:
        """The losses (L,) of a batch, whose gradients, times the loss scale, are added to those of others."""
        num_loss = len(self.config.ModelParam.train_symbol)
        outputs = self.module(**{name: batch[name] for name in self.config.data_name + self.config.label_name})
        losses = torch.stack([loss.reshape(()) for loss in outputs[:num_loss]])  # (L,)
        (losses.sum() * (self.scale.value if self.scale is not None else 1)).backward()
        for metric, span in self.metrics:
            labels = [batch[name] for name in metric.label_names]
            metric.update(labels, [output.detach() for output in outputs[span]])
        return losses.detach()


class _MovingStatistics:
    """The moving means and variances of BN in a step of several batches: each batch moves those of the step's begin,
    and the step ends with the mean of what came of it, as with several processes."""

    def __init__(self, module: nn.Module, keep: bool) -> None:
        self._now = list(module.buffers())
        self._begun = _copies(self._now) if keep else []
        self._sum: list[Tensor] = []
        self._num = 0

    def begin_again(self) -> None:
        if self._begun:
            torch._foreach_copy_(self._now, self._begun)

    def add(self) -> None:
        """A batch has moved them."""
        self._num += 1
        if self._sum:
            torch._foreach_add_(self._sum, self._now)
        else:
            self._sum = _copies(self._now)

    def finish(self, world: World) -> None:
        """The means over the batches, and over the processes of `world`."""
        if self._sum:
            torch._foreach_div_(self._sum, self._num)
            torch._foreach_copy_(self._now, self._sum)
        world.mean_(self._now)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Made together: there are hundreds of small ones."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, tensors)
    return copies


def transform_batches(config: Config, batches: Sequence[Batch]) -> None:
    """What config.transform does with whole batches, all those of a step in one call."""
    for transform in config.transform.batch:
        if hasattr(transform, "apply_all"):
            transform.apply_all(batches)
            continue
        for batch in batches:
            transform.apply(batch)


def build_trainer(
    config: Config, device: torch.device, iter_per_epoch: int, start: Checkpoint | None, world: World = ALONE
) -> tuple[Trainer, list[str]]:
    """The network with its first weights, the optimizer and the schedule; and lines for the log."""
    graph, optimizer_param = config.ModelParam.train_symbol, config.OptimizeParam.optimizer
    internals = graph.get_internals()
    watched = [internals[name] for metric in config.metric_list for name in metric.output_names]
    computed_in, _ = precision(config.General, device)
    computed = in_precision(S.Group([graph, *watched]), computed_in)
    resize = config.ResizeParam
    plan = plan_recompute(computed, config.ModelParam, config.General.batch_image, resize.short, resize.long)
    module = S.lower(computed, seed=config.General.seed, recompute=plan.segments if plan else ())
    notes = load_first_weights(module, config, start)
    place(module, device).train()
    fixed = () if config.ModelParam.from_scratch else tuple(config.ModelParam.pretrain.fixed_param)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(fixed))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = SGD(
        trained.items(),
        *multipliers(graph.attr_dict(), trained),
        momentum=optimizer_param.momentum,
        wd=optimizer_param.wd,
        clip_gradient=optimizer_param.clip_gradient,
    )
    scale = LossScale() if computed_in == "float16" else None
    if start is not None:
        _load_state(read_tensors(start.state), optimizer, scale)
    metrics, position = [], len(graph)
    for metric in config.metric_list:
        metrics.append((metric, slice(position, position + len(metric.output_names))))
        position += len(metric.output_names)
    schedule = build_schedule(config, iter_per_epoch)
    average = GradientAverage(module.parameters(), world) if world.size > 1 else None
    trainer = Trainer(config, device, module, optimizer, schedule, metrics, world, average, scale, computed_in, plan)
    return trainer, notes


def _load_state(state: dict[str, Tensor], optimizer: SGD, scale: LossScale | None) -> None:
    """What `Trainer.state` gave, perhaps in another precision."""
    scale_state = {name: state.pop(name) for name in [LOSS_SCALE] if name in state}
    optimizer.load_state_dict(state)
    if scale is not None:
        scale.load_state_dict(scale_state)
