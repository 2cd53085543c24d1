"""MXNet as the engine: its executor, its SGD, its kvstore, our operators. All else is what the engine torch uses too.

On CPUs this was tried with MXNet 1.9.1; on GPUs, with a CUDA build of MXNet, it was not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from core.distributed.process_group import ALONE, World
from core.engine import trainer as torch_engine
from core.engine.precision import Precision
from core.engine.schedule import LrSchedule
from core.engine.trainer import StepRecord, transform_batches
from core.engine_mxnet.graph import (
    RateOfStep,
    bind_module,
    gradients_of,
    load_symbol,
    loss_values,
    state_of,
    statistics_of,
)
from core.engine_mxnet.kvstore import Kvstore
from core.weights.checkpoint import Checkpoint
from models.record import Batch, select
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
    """What core.detection_module needs of a trainer, by MXNet.

    A process computes on all devices of its machine, each with a module of its own. All of them make the same update,
    from gradients that the kvstore added up.
    """

    config: Config
    graph: Symbol
    executors: list[Any]  # a bound mx.mod.Module for every device
    kvstore: Kvstore
    module: Weights
    schedule: LrSchedule
    metrics: list[tuple[Any, slice]]  # each with the span of its outputs among an executor's
    device: torch.device  # where batches are made: the CPU
    world: World = ALONE
    scale: None = None
    computed_in: Precision = "float32"

    def step(self, batches: Sequence[Batch], step: int) -> StepRecord:
        """One update from OptimizeParam.accumulate batches for every device, as torch's engine makes it of as many."""
        transform_batches(self.config, batches)
        num = len(self.executors)
        rounds = [batches[i : i + num] for i in range(0, len(batches), num)]
        is_local = self.config.NormalizeParam.type == "localbn"
        statistics = _MovingStatistics(self.executors, keep=len(rounds) > 1, is_local=is_local)
        for executor, batch in zip(self.executors, batches, strict=False):
            if len(rounds) > 1 or not len(batch["data"]):
                _clear(gradients_of(executor))
        losses = []
        for number, parts in enumerate(rounds):
            if number:
                statistics.begin_again()
            losses += self._forward_backward(parts)
            if len(rounds) > 1:
                statistics.add()
        norm = self._mean_gradient()
        statistics.finish(self.kvstore)
        for executor in self.executors:
            executor._optimizer.lr_scheduler.step = step
            executor.update()
        files = [path for batch in batches for path in batch["files"]]
        mean = np.mean(losses, axis=0)  # (L,)
        return StepRecord(step, self.schedule.lr_at(step), files, torch.tensor([*mean, norm]))

    def state(self) -> dict[str, Tensor]:
        """The momentum of every trained parameter."""
        first = self.executors[0]
        names, weights = first._optimizer.idx2name, first.get_params()[0]
        return {
            # MXNet keeps none where the factor of momentum is 0
            names[i]: torch.zeros(weights[names[i]].shape) if state is None else torch.from_numpy(state.asnumpy())
            for i, state in first._updater.states.items()
        }

    def describe(self) -> list[str]:
        """How it computes, as lines for the log."""
        where, kvstore = contexts(self.config), self.config.KvstoreParam
        shared = f", gradients added up by kvstore {kvstore.kvstore}" if kvstore.num_device > 1 else ""
        machines = f" on each of {kvstore.machines} machines" if kvstore.machines > 1 else ""
        lines = [
            f"engine: MXNet {load_mxnet().__version__} on {', '.join(map(str, where))}{machines}, in float32{shared}"
        ]
        if self.config.ModelParam.memonger:
            lines.append("ModelParam.memonger is not read by this engine: nothing is computed again")
        return lines

    def _forward_backward(self, parts: Sequence[Batch]) -> list[list[float]]:
        """The losses (L,) of a batch on every device. Gradients of those without images stay as they were."""
        computed = {place: batch for place, batch in enumerate(parts) if len(batch["data"])}
        if computed and self.config.NormalizeParam.type == "syncbn":
            # its BatchNorm waits for all devices, and weights them alike: those without images get the others' by
            # turns, from which there is no loss
            given = [_without_labels(batch) for batch in computed.values()]
            computed = {place: computed.get(place, given[place % len(given)]) for place in range(len(parts))}
        inputs = {place: self._inputs(batch, place) for place, batch in computed.items()}
        for place, given in inputs.items():  # binding anew waits for what runs, so before any device begins
            _fit(self.executors[place], given)
        for place, given in inputs.items():
            self.executors[place].forward(given, is_train=True)
        for place in computed:
            self.executors[place].backward()
        losses = [[0.0] * len(self.graph) for _ in parts]
        for place, batch in computed.items():
            executor = self.executors[place]
            losses[place] = loss_values(self.graph, executor, batch["rpn_cls_label"].numpy())
            outputs = executor.get_outputs()
            for metric, span in self.metrics:
                watched = [torch.from_numpy(output.asnumpy()) for output in outputs[span]]
                metric.update(list(select(batch, metric.label_names).values()), watched)
        return losses

    def _inputs(self, batch: Batch, place: int) -> Any:
        mx, executor = load_mxnet(), self.executors[place]
        (context,) = executor._context
        labels = [name for name, *_ in executor.label_shapes]
        tensors = select(batch, ["data", *labels]).values()
        data, *given = [mx.nd.array(tensor.float().numpy(), ctx=context) for tensor in tensors]
        return mx.io.DataBatch([data], given)

    def _mean_gradient(self) -> float:
        """Gradients become their sums over all devices; the norm of their mean."""
        gradients = [gradients_of(executor) for executor in self.executors]
        self.kvstore.add_up(gradients)
        total = sum(np.square(gradient.asnumpy(), dtype=np.float64).sum() for gradient in gradients[0].values())
        return float(np.sqrt(total) * self.executors[0]._optimizer.rescale_grad)


class _MovingStatistics:
    """BatchNorm's moving means and variances on this machine's devices: each batch moves those of the step's begin, and
    the step ends with the mean of what came of it."""

    def __init__(self, executors: Sequence[Any], keep: bool, is_local: bool) -> None:
        self._executors = executors
        self._is_local = is_local
        self._begun = [{name: value.copy() for name, value in now.items()} for now in self._now()] if keep else []
        self._sum: list[dict[str, Any]] = []
        self._num = 0

    def _now(self) -> list[dict[str, Any]]:
        return [statistics_of(executor) for executor in self._executors]

    def _set(self, values: Sequence[Mapping[str, Any]]) -> None:
        for now, wanted in zip(self._now(), values, strict=True):
            for name, value in wanted.items():
                now[name][:] = value
        load_mxnet().nd.waitall()

    def begin_again(self) -> None:
        self._set(self._begun)

    def add(self) -> None:
        """A batch of every device has moved them."""
        now, self._num = self._now(), self._num + 1
        sums = self._sum or [dict.fromkeys(each, 0) for each in now]
        self._sum = [
            {name: value + sum[name] for name, value in each.items()} for each, sum in zip(now, sums, strict=True)
        ]

    def finish(self, kvstore: Kvstore) -> None:
        """The means over the batches, and over the devices of all machines, where these have each its own."""
        if self._sum:
            self._set([{name: value / self._num for name, value in each.items()} for each in self._sum])
        if kvstore.size > 1 and self._is_local:
            self._set([{name: value / kvstore.size for name, value in now.items()} for now in self._now()])
            kvstore.add_up(self._now())


def _fit(executor: Any, batch: Any) -> None:
    """Bind a module anew where a batch has another shape than the last one."""
    if executor.data_shapes[0].shape == batch.data[0].shape:  # the labels follow from the images
        return
    described = ((executor.data_shapes, batch.data), (executor.label_shapes, batch.label))
    wanted = [
        [load_mxnet().io.DataDesc(one.name, array.shape, one.dtype) for one, array in zip(shapes, arrays, strict=True)]
        for shapes, arrays in described
    ]
    executor.reshape(*wanted)


def _clear(gradients: Mapping[str, Any]) -> None:
    for gradient in gradients.values():
        gradient[:] = 0


def _without_labels(batch: Batch) -> Batch:
    """The images of a batch, with labels from which neither loss nor gradient comes."""
    ignored = torch.full_like(batch["rpn_cls_label"], -1)
    return batch | {"rpn_cls_label": ignored, "rpn_reg_weight": torch.zeros_like(batch["rpn_reg_weight"])}


def build_trainer(
    config: Config, iter_per_epoch: int, start: Checkpoint | None, world: World = ALONE
) -> tuple[MxnetTrainer, list[str]]:
    """The network with its first weights, and lines for the log. `world` has a process for every machine.

    Raises ValueError for what this engine does not do.
    """
    kvstore, graph = config.KvstoreParam, in_precision(config.ModelParam.train_symbol, "float32")
    if kvstore.machines > 1 and config.NormalizeParam.type == "syncbn":
        raise ValueError(
            "NormalizeParam.type=syncbn: MXNet's synced BatchNorm is for the devices of one machine; train on one, "
            "take localbn, or use the engine torch"
        )
    _let_devices_wait(config, graph)
    # the first weights, the momentum of a checkpoint and what is trained: as torch has it
    host = torch.device("cpu")
    first, notes = torch_engine.build_trainer(config, host, iter_per_epoch, start)
    trained = {name for name, parameter in first.module.named_parameters() if parameter.requires_grad}
    state = {name: value.numpy() for name, value in first.module.state_dict().items()}
    accumulate, executors = config.OptimizeParam.accumulate, []
    for context in contexts(config):
        executor = bind_module(
            graph,
            input_shapes(config, graph),
            state,
            context=context,
            fixed=sorted(name for name, _ in first.module.named_parameters() if name not in trained),
            watched=[name for metric in config.metric_list for name in metric.output_names],
            grad_req="add" if accumulate > 1 else "write",
        )
        executor.init_optimizer(
            kvstore=None,
            optimizer="sgd",
            optimizer_params={
                "learning_rate": first.schedule.lr,
                "momentum": config.OptimizeParam.optimizer.momentum,
                "wd": config.OptimizeParam.optimizer.wd,
                "clip_gradient": config.OptimizeParam.optimizer.clip_gradient,
                "rescale_grad": 1 / (kvstore.num_device * accumulate),
                "multi_precision": True,
                "lr_scheduler": RateOfStep(first.schedule),
            },
        )
        if start is not None:
            _resume(executor, first.optimizer.state_dict())
        executors.append(executor)
    sums = Kvstore(kvstore.kvstore, len(executors), world)
    weights = Weights(executors[0], list(state))
    return (
        MxnetTrainer(config, graph, executors, sums, weights, first.schedule, first.metrics, host, world),
        notes,
    )


def _let_devices_wait(config: Config, graph: Symbol) -> None:
    """Room for synced BatchNorms, which wait for the other devices in MXNet's workers.

    A graph with branches has several that wait at once: with a worker for each there is always another to go on. CPU
    devices share their workers. In one of the bundles that MXNet makes of operators, one that waits would keep the
    others of its bundle from it.

    Raises ValueError where MXNet has started with fewer workers.
    """
    kvstore, num_norm = config.KvstoreParam, sum(node.op == "_contrib_SyncBatchNorm" for node in graph.nodes())
    if kvstore.num_device == 1 or not num_norm:
        return
    name, wanted = "MXNET_CPU_WORKER_NTHREADS", num_norm * kvstore.num_device
    if kvstore.gpus:
        name, wanted = "MXNET_GPU_WORKER_NTHREADS", num_norm
    os.environ["MXNET_EXEC_BULK_EXEC_TRAIN"] = "0"
    if "mxnet" not in sys.modules:
        os.environ.setdefault(name, str(wanted))
    if int(os.environ.get(name, "1")) < wanted:
        raise ValueError(
            f"{name}: expected {wanted} or more, set before MXNet is imported, or synced BatchNorms block each other; "
            f"got {os.environ.get(name, 'none')}"
        )


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
            updater.states_synced[index] = False  # so that MXNet moves it to the weight's device


def contexts(config: Config, most: int | None = None) -> list[Any]:
    """MXNet's devices on this machine, the first `most` (None: all) of KvstoreParam.gpus, or as many of the CPU as
    KvstoreParam.processes says.

    Raises ValueError for GPUs that MXNet does not find.
    """
    mx, gpus = load_mxnet(), config.KvstoreParam.gpus[:most]
    found = mx.context.num_gpus() if gpus else 0
    if gpus and max(gpus) >= found:
        raise ValueError(
            f"the config asks for the GPUs {','.join(map(str, gpus))}; this MXNet finds {found}: name those that are "
            "there with --gpus, or add --gpus cpu"
        )
    return [mx.gpu(i) for i in gpus] or [mx.cpu(i) for i in range(config.KvstoreParam.processes)][:most]


class MxnetModule(nn.Module):
    """A test graph on MXNet, called as the lowered module is: inputs by name, outputs as a list."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._graph = in_precision(config.ModelParam.test_symbol, "float32")
        (self._context,) = contexts(config, most=1)
        self._weights = {name: value.float().numpy() for name, value in weights.items()}
        self._executors: dict[tuple[int, ...], Any] = {}  # by the shape of the images

    def describe(self) -> str:
        """How it computes, as a line to print."""
        return f"engine: MXNet {load_mxnet().__version__} on {self._context}, in float32"

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
