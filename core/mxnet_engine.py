"""MXNet as the engine: its executor, its SGD, our operators. All else is what the engine torch uses too.

Runs on one device. On a CPU this was tried with MXNet 1.9.1; on GPUs, with a CUDA build of MXNet, it was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from core import trainer as torch_engine
from core.checkpoint import Checkpoint
from core.loader import Batch
from core.mxnet_graph import RateOfStep, bind_module, executor_gradients, load_symbol, loss_values, state_of
from core.precision import Precision
from core.schedule import LrSchedule
from core.trainer import StepRecord
from core.world import ALONE, World
from operator_cxx.mxnet_ops import load_mxnet
from symbol import Symbol
from symbol.passes import in_precision

if TYPE_CHECKING:
    from config.schema import Config


@dataclass(frozen=True)
class Weights:
    """The weights and statistics of an MXNet module, as a checkpoint takes them."""

    module: Any
    names: list[str]

    def state_dict(self) -> dict[str, Tensor]:
        state = state_of(self.module)
        return {name: torch.from_numpy(state[name]) for name in self.names}


@dataclass(frozen=True)
class MxnetTrainer:
    """What core.detection_module needs of a trainer, by MXNet."""

    config: Config
    graph: Symbol
    executor: Any  # a bound mx.mod.Module
    module: Weights
    schedule: LrSchedule
    metrics: list[tuple[Any, slice]]  # each with the span of its outputs among the executor's
    device: torch.device  # where batches are made: the CPU
    world: World = ALONE
    scale: None = None
    computed_in: Precision = "float32"

    def step(self, batches: Sequence[Batch], step: int) -> StepRecord:
        """One update."""
        mx = load_mxnet()
        (batch,) = batches
        for transform in self.config.transform.batch:
            transform.apply(batch)
        inputs = {name: batch[name].float().numpy() for name in self.config.data_name + self.config.label_name}
        labels = [mx.nd.array(inputs[name]) for name, *_ in self.executor.label_shapes]
        self.executor.forward(mx.io.DataBatch([mx.nd.array(inputs["data"])], labels), is_train=True)
        self.executor.backward()
        losses = loss_values(self.graph, self.executor, inputs["rpn_cls_label"])
        gradients = executor_gradients(self.executor)
        norm = float(np.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in gradients.values())))
        self.executor._optimizer.lr_scheduler.step = step
        self.executor.update()
        outputs = self.executor.get_outputs()
        for metric, span in self.metrics:
            watched = [torch.from_numpy(output.asnumpy()) for output in outputs[span]]
            metric.update([batch[name] for name in metric.label_names], watched)
        return StepRecord(step, self.schedule.lr_at(step), batch["files"], torch.tensor([*losses, norm]))

    def state(self) -> dict[str, Tensor]:
        """The momentum of every trained parameter."""
        names, weights = self.executor._optimizer.idx2name, self.executor.get_params()[0]
        return {
            # MXNet keeps none where the factor of momentum is 0
            names[i]: torch.zeros(weights[names[i]].shape) if state is None else torch.from_numpy(state.asnumpy())
            for i, state in self.executor._updater.states.items()
        }

    def describe(self) -> list[str]:
        """How it computes, as lines for the log."""
        lines = [f"engine: MXNet {load_mxnet().__version__} on {contexts(self.config)[0]}, in float32"]
        if self.config.ModelParam.memonger:
            lines.append("ModelParam.memonger is not read by this engine: nothing is computed again")
        return lines


def build_trainer(config: Config, iter_per_epoch: int, start: Checkpoint | None) -> tuple[MxnetTrainer, list[str]]:
    """The network with its first weights, and lines for the log. Raises ValueError for what this engine does not do."""
    if config.KvstoreParam.num_device > 1 or config.OptimizeParam.accumulate > 1:
        raise ValueError(
            "the engine mxnet runs on one device, a batch a step: give one of --gpus, and leave KvstoreParam.processes "
            "and OptimizeParam.accumulate at 1, or use the engine torch"
        )
    # the first weights, the momentum of a checkpoint and what is trained: as torch has it
    host = torch.device("cpu")
    first, notes = torch_engine.build_trainer(config, host, iter_per_epoch, start)
    graph = in_precision(config.ModelParam.train_symbol, "float32")
    trained = {name for name, parameter in first.module.named_parameters() if parameter.requires_grad}
    state = {name: value.numpy() for name, value in first.module.state_dict().items()}
    executor = bind_module(
        graph,
        input_shapes(config, graph),
        state,
        contexts=contexts(config),
        fixed=sorted(name for name, _ in first.module.named_parameters() if name not in trained),
        watched=[name for metric in config.metric_list for name in metric.output_names],
    )
    executor.init_optimizer(
        kvstore=config.KvstoreParam.kvstore,
        optimizer="sgd",
        optimizer_params={
            "learning_rate": first.schedule.lr,
            "momentum": config.OptimizeParam.optimizer.momentum,
            "wd": config.OptimizeParam.optimizer.wd,
            "clip_gradient": config.OptimizeParam.optimizer.clip_gradient,
            "rescale_grad": 1.0,
            "multi_precision": True,
            "lr_scheduler": RateOfStep(first.schedule),
        },
    )
    if start is not None:
        _resume(executor, first.optimizer.state_dict())
    weights = Weights(executor, list(state))
    return MxnetTrainer(config, graph, executor, weights, first.schedule, first.metrics, host), notes


def input_shapes(config: Config, graph: Symbol) -> dict[str, tuple[int, ...]]:
    """Of a batch of wide images; MXNet binds anew where another batch comes."""
    given: dict[str, tuple[int, ...]] = {}
    given["data"] = (config.General.batch_image, 3, config.ResizeParam.short, config.ResizeParam.long)
    if "rpn_fg_count" in graph.list_inputs():
        given["rpn_fg_count"] = (config.General.batch_image,)
    named = dict(zip(graph.list_arguments(), graph.infer_shape(**given)[0], strict=True))
    return {name: named[name] for name in graph.list_inputs()}


def _resume(executor: Any, momentum: Mapping[str, Tensor]) -> None:
    mx, optimizer, updater = load_mxnet(), executor._optimizer, executor._updater
    for index, name in optimizer.idx2name.items():
        if name in momentum:
            updater.states[index] = mx.nd.array(momentum[name].numpy())
            updater.states_synced[index] = True


def contexts(config: Config) -> list[Any]:
    """MXNet's devices: KvstoreParam.gpus, or the CPU where it is empty."""
    mx = load_mxnet()
    return [mx.gpu(i) for i in config.KvstoreParam.gpus] or [mx.cpu()]


class MxnetModule(nn.Module):
    """A test graph on MXNet, called as the lowered module is: inputs by name, outputs as a list."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._graph = in_precision(config.ModelParam.test_symbol, "float32")
        self._context = contexts(config)[0]
        self._weights = {name: value.float().numpy() for name, value in weights.items()}
        self._executors: dict[tuple[int, ...], Any] = {}  # by the shape of the images

    @torch.no_grad()
    def forward(self, **inputs: Tensor) -> list[Tensor]:
        mx = load_mxnet()
        arrays = {name: mx.nd.array(value.numpy(), ctx=self._context) for name, value in inputs.items()}
        executor = self._executor(arrays)
        return [torch.from_numpy(output.asnumpy()) for output in executor.forward(is_train=False, **arrays)]

    def _executor(self, inputs: Mapping[str, Any]) -> Any:
        shape = inputs["data"].shape
        if shape not in self._executors:
            mx = load_mxnet()
            given = {name: mx.nd.array(value, ctx=self._context) for name, value in self._weights.items()}
            auxiliary = {name: given.pop(name) for name in self._graph.list_auxiliary_states()}
            arguments = {**given, **{name: value.copy() for name, value in inputs.items()}}
            self._executors[shape] = load_symbol(self._graph).bind(
                self._context, arguments, grad_req="null", aux_states=auxiliary
            )
        return self._executors[shape]
