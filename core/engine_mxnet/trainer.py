"""A training step in MXNet: batches in, an update of the weights out. L losses of the train graph."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from core.engine.moving_statistics import MovingStatistics
from core.engine.optimizer import require_state
from core.engine.precision import LOSS_SCALE, Precision
from core.engine.schedule import LrSchedule, build_schedule
from core.engine.trainer import is_trained, metric_spans, transform_batches
from core.engine_mxnet.graph import (
    MxnetLrScheduler,
    bind_module,
    contexts,
    gradients_of,
    loss_values,
    state_of,
    statistics_of,
)
from core.engine_mxnet.kvstore import Kvstore
from core.protocol import StepRecord
from core.weights.checkpoint import Checkpoint, read_tensors
from core.weights.first_weights import first_weights
from models.record import Batch, select
from operator_cxx.mxnet_ops import load_mxnet
from symbol import Symbol
from symbol.initializer import first_value
from symbol.passes import in_precision

if TYPE_CHECKING:
    from config.schema import Config


@dataclass(frozen=True)
class MxnetTrainer:
    """The network on all devices of this machine, one bound module per device; implements core.protocol.Trainer.

    All modules make the same update, from the gradients' sum by the kvstore.
    """

    config: Config
    graph: Symbol
    executors: list[Any]  # one bound mx.mod.Module per device
    kvstore: Kvstore
    names: list[str]  # names of parameters and auxiliary states
    schedule: LrSchedule
    metrics: list[tuple[Any, slice]]  # each with the span of its outputs among an executor's
    device: torch.device  # the CPU, where batches are transformed
    group: ProcessGroup = SINGLE_PROCESS
    compute_dtype: Precision = "float32"

    def step(self, batches: Sequence[Batch], step: int) -> StepRecord:
        """Make one update from OptimizeParam.accumulate batches per device, equal to that of the engine torch."""
        transform_batches(self.config, batches)
        num = len(self.executors)
        rounds = [batches[i : i + num] for i in range(0, len(batches), num)]
        accumulates = len(rounds) > 1
        statistics = MovingStatistics(self._read_statistics, self._write_statistics, keep=accumulates)

        # forward and backward, round after round; MXNet adds up the gradients
        for executor, batch in zip(self.executors, batches, strict=False):
            if accumulates or not len(batch["data"]):
                for gradient in gradients_of(executor).values():
                    gradient[:] = 0
        losses = []
        for number, parts in enumerate(rounds):
            if number:
                statistics.restart()
            losses += self._forward_backward(parts)
            if accumulates:
                statistics.add()
        gradients = [gradients_of(executor) for executor in self.executors]
        self.kvstore.all_reduce_sum_(gradients)
        total = sum(np.square(gradient.asnumpy(), dtype=np.float64).sum() for gradient in gradients[0].values())
        norm = float(np.sqrt(total) * self.executors[0]._optimizer.rescale_grad)  # of the mean

        # update
        if accumulates:
            statistics.set_mean()
        if self.kvstore.size > 1 and self.config.NormalizeParam.type == "localbn":
            self._write_statistics([value / self.kvstore.size for value in self._read_statistics()])
            self.kvstore.all_reduce_sum_([statistics_of(executor) for executor in self.executors])
        for executor in self.executors:
            executor._optimizer.lr_scheduler.step = step
            executor.update()
        files = [path for batch in batches for path in batch["files"]]
        mean = np.mean(losses, axis=0)  # (L,)
        return StepRecord(step, self.schedule.lr_at(step), files, torch.tensor([*mean, norm]))

    def weights(self) -> Mapping[str, Tensor]:
        state = state_of(self.executors[0])
        return {name: torch.from_numpy(state[name]) for name in self.names}

    def state(self) -> dict[str, Tensor]:
        """Return the momentum of every trained parameter."""
        first = self.executors[0]
        names, weights = first._optimizer.idx2name, first.get_params()[0]
        return {
            # without momentum MXNet has no state
            names[i]: torch.zeros(weights[names[i]].shape) if state is None else torch.from_numpy(state.asnumpy())
            for i, state in first._updater.states.items()
        }

    def loss_scale(self) -> None:
        return None

    def describe(self) -> list[str]:
        devices, kvstore = ", ".join(map(str, contexts(self.config))), self.config.KvstoreParam
        shared = f", gradients summed by kvstore {kvstore.kvstore}" if kvstore.num_device > 1 else ""
        machines = f" on each of {kvstore.machines} machines" if kvstore.machines > 1 else ""
        lines = [f"engine: MXNet {load_mxnet().__version__} on {devices}{machines}, in float32{shared}"]
        if self.config.ModelParam.memonger:
            lines.append("ModelParam.memonger is not read by this engine: nothing is recomputed")
        for name in ("cuda_graph", "compile"):
            if getattr(self.config.General, name):
                lines.append(f"General.{name} is not read by this engine")
        return lines

    def _forward_backward(self, parts: Sequence[Batch]) -> list[list[float]]:
        """Return the losses (L,) of a batch on each device. Gradients of devices without images do not change."""
        computed = {i: batch for i, batch in enumerate(parts) if len(batch["data"])}
        if computed and self.config.NormalizeParam.type == "syncbn":
            # MXNet's synced BatchNorm waits for all devices and weights them equally: devices without images get
            # those of the others in turn, without labels
            given = [_without_labels(batch) for batch in computed.values()]
            computed = {i: computed.get(i, given[i % len(given)]) for i in range(len(parts))}
        inputs = {i: self._inputs(batch, i) for i, batch in computed.items()}
        for i, given in inputs.items():  # rebinding waits for running operators, so before any device starts
            _rebind(self.executors[i], given)
        for i, given in inputs.items():
            self.executors[i].forward(given, is_train=True)
        for i in computed:
            self.executors[i].backward()
        losses = [[0.0] * len(self.graph) for _ in parts]
        for i, batch in computed.items():
            executor = self.executors[i]
            losses[i] = loss_values(self.graph, executor, batch["rpn_cls_label"].numpy())
            outputs = executor.get_outputs()
            for metric, span in self.metrics:
                watched = [torch.from_numpy(output.asnumpy()) for output in outputs[span]]
                metric.update(list(select(batch, metric.label_names).values()), watched)
        return losses

    def _inputs(self, batch: Batch, device: int) -> Any:
        mx, executor = load_mxnet(), self.executors[device]
        (context,) = executor._context
        labels = [name for name, *_ in executor.label_shapes]
        tensors = select(batch, ["data", *labels]).values()
        data, *given = [mx.nd.array(tensor.float().numpy(), ctx=context) for tensor in tensors]
        return mx.io.DataBatch([data], given)

    def _read_statistics(self) -> list[Any]:
        """Return copies of the moving statistics of all devices."""
        return [value.copy() for executor in self.executors for value in statistics_of(executor).values()]

    def _write_statistics(self, values: Sequence[Any]) -> None:
        now = [value for executor in self.executors for value in statistics_of(executor).values()]
        for target, value in zip(now, values, strict=True):
            target[:] = value
        load_mxnet().nd.waitall()


def _rebind(executor: Any, batch: Any) -> None:
    """Rebind a module if the shape of the batch differs from that of the last one."""
    if executor.data_shapes[0].shape == batch.data[0].shape:  # the labels follow from the images
        return
    described = ((executor.data_shapes, batch.data), (executor.label_shapes, batch.label))
    shapes = [
        [load_mxnet().io.DataDesc(one.name, array.shape, one.dtype) for one, array in zip(before, arrays, strict=True)]
        for before, arrays in described
    ]
    executor.reshape(*shapes)


def _without_labels(batch: Batch) -> Batch:
    """Return the images of a batch with labels that contribute neither loss nor gradient."""
    ignored = torch.full_like(batch["rpn_cls_label"], -1)
    return batch | {"rpn_cls_label": ignored, "rpn_reg_weight": torch.zeros_like(batch["rpn_reg_weight"])}


def build_trainer(
    config: Config, iter_per_epoch: int, start: Checkpoint | None, group: ProcessGroup = SINGLE_PROCESS
) -> tuple[MxnetTrainer, list[str]]:
    """Build the network with its first weights. Also returns lines for the log. `group` has one process per machine.

    Raises ValueError for configs that this engine does not support.
    """
    kvstore, graph = config.KvstoreParam, in_precision(config.ModelParam.train_symbol, "float32")
    if kvstore.machines > 1 and config.NormalizeParam.type == "syncbn":
        raise ValueError(
            "NormalizeParam.type=syncbn: MXNet's synced BatchNorm is for the devices of one machine; train on one, "
            "set localbn, or use the engine torch"
        )
    _reserve_workers(config, graph)
    inputs = input_shapes(config, graph)
    arguments, _, auxiliary = graph.infer_shape(**inputs)
    shapes = dict(zip(graph.list_arguments(), arguments, strict=True))
    parameters = {name: shape for name, shape in shapes.items() if name not in inputs}
    shapes = parameters | dict(zip(graph.list_auxiliary_states(), auxiliary, strict=True))
    given, notes = first_weights(shapes, config, start)
    hints, seed = graph.attr_dict(), config.General.seed
    state = {name: value.numpy() for name, value in given.items()}
    state |= {
        name: first_value(name, shape, hints.get(name, {}).get("__init__"), seed)
        for name, shape in shapes.items()
        if name not in given
    }
    trained = {name: shape for name, shape in parameters.items() if is_trained(config, name)}
    momentum: dict[str, Tensor] = {}
    if start is not None:
        momentum = read_tensors(start.state)
        momentum.pop(LOSS_SCALE, None)  # from a run in float16
        require_state(trained, momentum)
    schedule, executors = build_schedule(config, iter_per_epoch), []
    for context in contexts(config):
        executor = bind_module(
            graph,
            inputs,
            state,
            context=context,
            fixed=sorted(parameters.keys() - trained.keys()),
            watched=[name for metric in config.metric_list for name in metric.output_names],
            grad_req="add" if config.OptimizeParam.accumulate > 1 else "write",
        )
        _init_optimizer(executor, config, schedule, momentum)
        executors.append(executor)
    sums, metrics = Kvstore(kvstore.kvstore, len(executors), group), metric_spans(config)
    cpu = torch.device("cpu")
    return MxnetTrainer(config, graph, executors, sums, list(shapes), schedule, metrics, cpu, group), notes


def _init_optimizer(executor: Any, config: Config, schedule: LrSchedule, momentum: Mapping[str, Tensor]) -> None:
    """Give a module MXNet's SGD, with the momentum of a checkpoint (empty: from zero)."""
    optimizer_param = config.OptimizeParam.optimizer
    executor.init_optimizer(
        kvstore=None,
        optimizer="sgd",
        optimizer_params={
            "learning_rate": schedule.lr,
            "momentum": optimizer_param.momentum,
            "wd": optimizer_param.wd,
            "clip_gradient": optimizer_param.clip_gradient,
            "rescale_grad": 1 / (config.KvstoreParam.num_device * config.OptimizeParam.accumulate),
            "multi_precision": True,
            "lr_scheduler": MxnetLrScheduler(schedule),
        },
    )
    mx, optimizer, updater = load_mxnet(), executor._optimizer, executor._updater
    for index, name in optimizer.idx2name.items():
        if name in momentum:
            updater.states[index] = mx.nd.array(momentum[name].numpy())
            updater.states_synced[index] = False  # so that MXNet moves it to the weight's device


def _reserve_workers(config: Config, graph: Symbol) -> None:
    """Set MXNet's number of workers such that synced BatchNorms, which block a worker each, cannot deadlock.

    In a graph with branches several of them wait for the other devices at once; with a worker for each, another
    operator can always run. CPU devices share their workers. Bulk execution is off, since a BatchNorm that waits would
    block the other operators of its bulk.

    Raises ValueError if MXNet was started with fewer workers.
    """
    kvstore, num_norm = config.KvstoreParam, sum(node.op == "_contrib_SyncBatchNorm" for node in graph.nodes())
    if kvstore.num_device == 1 or not num_norm:
        return
    name, required = "MXNET_CPU_WORKER_NTHREADS", num_norm * kvstore.num_device
    if kvstore.gpus:
        name, required = "MXNET_GPU_WORKER_NTHREADS", num_norm
    os.environ["MXNET_EXEC_BULK_EXEC_TRAIN"] = "0"
    if "mxnet" not in sys.modules:
        os.environ.setdefault(name, str(required))
    if int(os.environ.get(name, "1")) < required:
        raise ValueError(
            f"{name}: expected {required} or more, set before MXNet is imported, or synced BatchNorms block each "
            f"other; got {os.environ.get(name, 'none')}"
        )


def input_shapes(config: Config, graph: Symbol) -> dict[str, tuple[int, ...]]:
    """Return the input shapes for a batch of landscape images; other batches are bound on demand."""
    given: dict[str, tuple[int, ...]] = {
        "data": (config.General.batch_image, 3, config.ResizeParam.short, config.ResizeParam.long)
    }
    if "rpn_fg_count" in graph.list_inputs():
        given["rpn_fg_count"] = (config.General.batch_image,)
    named = dict(zip(graph.list_arguments(), graph.infer_shape(**given)[0], strict=True))
    return {name: named[name] for name in graph.list_inputs()}
