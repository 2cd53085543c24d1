"""A training step in torch: batches in, an update of the weights out. L losses of the train graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import symbol as S
from core.distributed.gradient_average import GradientAverage
from core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from core.engine.cuda_graph import CudaRecorder, GraphedPass, graph_obstacle
from core.engine.device import move_module
from core.engine.moving_statistics import MovingStatistics
from core.engine.optimizer import SGD, multipliers
from core.engine.precision import (
    LOSS_SCALE,
    LossScale,
    LossScaleState,
    Precision,
    configure_arithmetic,
    precision,
)
from core.engine.schedule import LrSchedule, build_schedule
from core.engine.step_memory import plan_recompute
from core.protocol import StepRecord
from core.weights.checkpoint import Checkpoint, read_tensors
from core.weights.first_weights import first_weights, shapes_of
from models.record import Batch, select
from symbol.memory import Plan
from symbol.passes import fuse_batch_norm, in_precision, without_gradient

if TYPE_CHECKING:
    from config.schema import Config


@dataclass(frozen=True)
class Trainer:
    """The network on its device with its optimizer and schedule; implements core.protocol.Trainer."""

    config: Config
    device: torch.device
    module: nn.Module
    optimizer: SGD
    schedule: LrSchedule
    metrics: list[tuple[Any, slice]]  # each with the span of its outputs among the module's
    group: ProcessGroup = SINGLE_PROCESS
    average: GradientAverage | None = None  # None: a single process
    scale: LossScale | None = None  # None: not in float16
    compute_dtype: Precision = "float32"
    plan: Plan | None = None  # None: nothing is recomputed
    graphed: GraphedPass | None = None  # None: every pass is eager

    def step(self, batches: Sequence[Batch], step: int) -> StepRecord:
        """Make one update from OptimizeParam.accumulate batches; as many processes with one batch each make the same.

        All results stay on the device and the host does not wait for it. A step whose gradients are not finite under
        the loss scale does not change weights, momentum and statistics.
        """
        transform_batches(self.config, batches)
        accumulates = len(batches) > 1
        statistics = MovingStatistics(
            self._read_statistics, self._write_statistics, keep=accumulates or self.scale is not None
        )

        # forward and backward, batch after batch; autograd adds up the gradients
        self.optimizer.zero_grad()
        losses = []
        for i, batch in enumerate(batches):
            if i:
                statistics.restart()
            if self.average is not None and self.average.overlaps and i == len(batches) - 1:
                self.average.start()
            losses.append(self._forward_backward(batch))
            if accumulates:
                statistics.add()
        if self.average is not None:
            if not self.average.overlaps:
                self.average.start()
            self.average.finish()

        # norm of the mean loss's gradients, and whether they overflowed; the update, not a pass before it, divides them
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm, divisor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))), None
        if self.scale is not None:
            divisor = len(batches) * self.scale.value
        elif accumulates:
            divisor = torch.full((), float(len(batches)), device=self.device)
        norm = norm if divisor is None else norm / divisor
        found_inf = ~norm.isfinite() if self.scale is not None else None

        # update
        lr = self.schedule.lr_at(step)
        self.optimizer.step(lr, divisor, found_inf)
        if accumulates:
            statistics.set_mean()
        if self.config.NormalizeParam.type == "localbn":
            self.group.all_reduce_mean_(list(self.module.buffers()))
        if self.scale is not None and found_inf is not None:
            (start,), (now,) = statistics.start, self._read_statistics()
            self._write_statistics([torch.where(found_inf, start, now)])
            self.scale.update(found_inf)

        mean = torch.stack(losses).mean(dim=0)  # (L,)
        files = [path for batch in batches for path in batch["files"]]
        record = StepRecord(step, lr, files, torch.cat([mean, norm.reshape(1)]), found_inf)
        if self.graphed is not None:
            record.notes.extend(self.graphed.notes)
            self.graphed.notes.clear()
        return record

    def _forward_backward(self, batch: Batch) -> Tensor:
        """Return the losses (L,) of a batch; its gradients, times the loss scale, are added to `.grad`."""
        inputs = select(batch, self.config.data_name + self.config.label_name)
        losses, *outputs = self._pass(inputs) if self.graphed is None else self.graphed(self._pass, inputs)
        for metric, span in self.metrics:
            labels = select(batch, metric.label_names)
            metric.update(list(labels.values()), outputs[span])
        return losses.clone()

    def _pass(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the losses (L,) and all outputs of a forward and backward pass."""
        outputs = self.module(**inputs)
        losses = torch.stack([loss.reshape(()) for loss in outputs[: len(self.config.ModelParam.train_symbol)]])  # (L,)
        (losses.sum() * (self.scale.value if self.scale is not None else 1)).backward()
        return [losses.detach(), *(output.detach() for output in outputs)]

    def _read_statistics(self) -> list[Tensor]:
        """Return a copy of all moving statistics, vectors, as one: torch.cat launches the fewest kernels."""
        return [torch.cat(list(self.module.buffers()))]

    def _write_statistics(self, flat: Sequence[Tensor]) -> None:
        buffers = list(self.module.buffers())
        torch._foreach_copy_(buffers, list(flat[0].split([len(buffer) for buffer in buffers])))

    def weights(self) -> Mapping[str, Tensor]:
        return self.module.state_dict()

    def state(self) -> dict[str, Tensor]:
        return self.optimizer.state_dict() | (self.scale.state_dict() if self.scale is not None else {})

    def loss_scale(self) -> LossScaleState | None:
        return self.scale.read() if self.scale is not None else None

    def describe(self) -> list[str]:
        general = self.config.General
        lines = [precision(general, self.device)[1], *([self.plan.describe()] if self.plan else [])]
        if general.cuda_graph:
            obstacle = graph_obstacle(self.config, self.device)
            lines.append(f"General.cuda_graph is set: {obstacle or 'full batches are computed by CUDA graphs'}")
        if general.compile:
            lines.append("General.compile is set: torch compiles the network in the first steps")
        return lines


def transform_batches(config: Config, batches: Sequence[Batch]) -> None:
    """Apply config.transform's batch transforms to all batches of a step."""
    for transform in config.transform.batch:
        transform.apply_step(batches)


def metric_spans(config: Config) -> list[tuple[Any, slice]]:
    """Return the metrics, each with the span of its outputs, which follow those of the train graph."""
    spans, position = [], len(config.ModelParam.train_symbol)
    for metric in config.metric_list:
        spans.append((metric, slice(position, position + len(metric.output_names))))
        position += len(metric.output_names)
    return spans


def is_trained(config: Config, name: str) -> bool:
    """Return True if a parameter is trained: its name has no prefix of ModelParam.pretrain.fixed_param."""
    fixed = () if config.ModelParam.from_scratch else tuple(config.ModelParam.pretrain.fixed_param)
    return not name.startswith(fixed)


def build_trainer(
    config: Config,
    device: torch.device,
    iter_per_epoch: int,
    start: Checkpoint | None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[Trainer, list[str]]:
    """Build the network with its first weights, the optimizer and the schedule. Also returns lines for the log."""
    graph, optimizer_param = config.ModelParam.train_symbol, config.OptimizeParam.optimizer
    internals = graph.get_internals()
    watched = [internals[name] for metric in config.metric_list for name in metric.output_names]
    compute_dtype, _ = precision(config.General, device)
    computed = in_precision(S.Group([graph, *watched]), compute_dtype)
    resize = config.ResizeParam
    plan = plan_recompute(computed, config.ModelParam, config.General.batch_image, resize.short, resize.long)
    module = S.lower(computed, seed=config.General.seed, recompute=plan.segments if plan else ())
    tensors, notes = first_weights(shapes_of(module), config, start)
    module.load_state_dict(tensors, strict=False)
    configure_arithmetic(config.General, compute_dtype, device)
    move_module(module, device).train()
    trained = {name: p for name, p in module.named_parameters() if is_trained(config, name)}
    no_gradient = without_gradient(fuse_batch_norm(computed))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained and name not in no_gradient)
    optimizer = SGD(
        trained.items(),
        *multipliers(graph.attr_dict(), trained),
        momentum=optimizer_param.momentum,
        wd=optimizer_param.wd,
        clip_gradient=optimizer_param.clip_gradient,
    )
    scale = LossScale(device) if compute_dtype == "float16" else None
    if start is not None:
        state = read_tensors(start.state)
        scale_state = {name: state.pop(name) for name in [LOSS_SCALE] if name in state}
        optimizer.load_state_dict(state)
        if scale is not None:  # the state has none if the run computed in another precision before
            scale.load_state_dict(scale_state)
    schedule = build_schedule(config, iter_per_epoch)
    graphed = None
    if config.General.cuda_graph and graph_obstacle(config, device) is None:
        graphed = GraphedPass(module.parameters(), config.General.batch_image, CudaRecorder(device))
    if config.General.compile:
        module.compile(fullgraph=True, dynamic=False)
    average = None
    if group.world_size > 1:  # a replay of a graph calls no hooks
        average = GradientAverage(module.parameters(), group, overlaps=graphed is None)
    metrics = metric_spans(config)
    trainer = Trainer(
        config, device, module, optimizer, schedule, metrics, group, average, scale, compute_dtype, plan, graphed
    )
    return trainer, notes
