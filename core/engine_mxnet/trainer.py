"""A training step in MXNet: its executors, its SGD, its kvstore, our operators. L losses of the train graph."""

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
    RateOfStep,
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
    """The network on all devices of this machine, one bound module each.

    All modules make the same update, from gradients that the kvstore adds up.
    """

    config: Config
    graph: Symbol
    executors: list[Any]  # one bound mx.mod.Module per device
    kvstore: Kvstore
    names: list[str]  # of parameters and auxiliary states
    schedule: LrSchedule
    metrics: list[tuple[Any, slice]]  # each with the span of its outputs among an executor's
    device: torch.device  # the CPU, where batches are transformed
    group: ProcessGroup = SINGLE_PROCESS
    computed_in: Precision = "float32"

    def step(self, batches: Sequence[Batch], step: int) -> StepRecord:
        """Make one update from OptimizeParam.accumulate batches per device, as the engine torch makes it of as many."""
        transform_batches(self.config, batches)
        num = len(self.executors)
        rounds = [batches[i : i + num] for i in range(0, len(batches), num)]
        accumulates = len(rounds) > 1
        statistics = MovingStatistics(self._read_statistics, self._write_statistics, keep=accumulates)

        # forward and backward, round after round; the gradients add up
        for executor, batch in zip(self.executors, batches, strict=False):
            if accumulates or not len(batch["data"]):
                _clear(gradients_of(executor))
        losses = []
        for number, parts in enumerate(rounds):
            if number:
                statistics.restart()
            losses += self._forward_backward(parts)
            if accumulates:
                statistics.add()
        norm = self._mean_gradient()

        # update
        if accumulates:
            statistics.set_mean()
        if self.kvstore.size > 1 and self.config.NormalizeParam.type == "localbn":
            self._write_statistics([value / self.kvstore.size for value in self._read_statistics()])
            self.kvstore.add_up([statistics_of(executor) for executor in self.executors])
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
            # MXNet keeps none where the factor of momentum is 0
            names[i]: torch.zeros(weights[names[i]].shape) if state is None else torch.from_numpy(state.asnumpy())
            for i, state in first._updater.states.items()
        }

    def loss_scale(self) -> None:
        return None

    def describe(self) -> list[str]:
        where, kvstore = contexts(self.config), self.config.KvstoreParam
        shared = f", gradients added up by kvstore {kvstore.kvstore}" if kvstore.num_device > 1 else ""
        machines = f" on each of {kvstore.machines} machines" if kvstore.machines > 1 else ""
        lines = [
            f"engine: MXNet {load_mxnet().__version__} on {', '.join(map(str, where))}{machines}, in float32{shared}"
        ]
        if self.config.ModelParam.memonger:
            lines.append("ModelParam.memonger is not read by this engine: nothing is recomputed")
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

    def _read_statistics(self) -> list[Any]:
        """Return copies of the moving statistics of all devices."""
        return [value.copy() for executor in self.executors for value in statistics_of(executor).values()]

    def _write_statistics(self, values: Sequence[Any]) -> None:
        now = [value for executor in self.executors for value in statistics_of(executor).values()]
        for target, value in zip(now, values, strict=True):
            target[:] = value
        load_mxnet().nd.waitall()


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
    config: Config, iter_per_epoch: int, start: Checkpoint | None, group: ProcessGroup = SINGLE_PROCESS
) -> tuple[MxnetTrainer, list[str]]:
    """Build the network with its first weights, and lines for the log. `group` has one process per machine.

    Raises ValueError for what this engine does not do.
    """
    kvstore, graph = config.KvstoreParam, in_precision(config.ModelParam.train_symbol, "float32")
    if kvstore.machines > 1 and config.NormalizeParam.type == "syncbn":
        raise ValueError(
            "NormalizeParam.type=syncbn: MXNet's synced BatchNorm is for the devices of one machine; train on one, "
            "take localbn, or use the engine torch"
        )
    _let_devices_wait(config, graph)
    inputs = input_shapes(config, graph)
    arguments, _, auxiliary = graph.infer_shape(**inputs)
    shapes = dict(zip(graph.list_arguments(), arguments, strict=True))
    parameters = {name: shape for name, shape in shapes.items() if name not in inputs}
    shapes = parameters | dict(zip(graph.list_auxiliary_states(), auxiliary, strict=True))
    given, notes = first_weights(shapes, config, start)
    hints, seed = graph.attr_dict(), config.General.seed
    state = {
        name: given[name].numpy() if name in given
        else first_value(name, shape, hints.get(name, {}).get("__init__"), seed)
        for name, shape in shapes.items()
    }  # fmt: skip
    trained = {name: shape for name, shape in parameters.items() if is_trained(config, name)}
    momentum: dict[str, Tensor] = {}
    if start is not None:
        momentum = read_tensors(start.state)
        momentum.pop(LOSS_SCALE, None)  # of a run in float16
        require_state(trained, momentum)
    schedule, accumulate, executors = build_schedule(config, iter_per_epoch), config.OptimizeParam.accumulate, []
    for context in contexts(config):
        executor = bind_module(
            graph,
            inputs,
            state,
            context=context,
            fixed=sorted(parameters.keys() - trained.keys()),
            watched=[name for metric in config.metric_list for name in metric.output_names],
            grad_req="add" if accumulate > 1 else "write",
        )
        executor.init_optimizer(
            kvstore=None,
            optimizer="sgd",
            optimizer_params={
                "learning_rate": schedule.lr,
                "momentum": config.OptimizeParam.optimizer.momentum,
                "wd": config.OptimizeParam.optimizer.wd,
                "clip_gradient": config.OptimizeParam.optimizer.clip_gradient,
                "rescale_grad": 1 / (kvstore.num_device * accumulate),
                "multi_precision": True,
                "lr_scheduler": RateOfStep(schedule),
            },
        )
        _load_momentum(executor, momentum)
        executors.append(executor)
    sums, metrics = Kvstore(kvstore.kvstore, len(executors), group), metric_spans(config)
    cpu = torch.device("cpu")
    return MxnetTrainer(config, graph, executors, sums, list(state), schedule, metrics, cpu, group), notes


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


def _load_momentum(executor: Any, momentum: Mapping[str, Tensor]) -> None:
    mx, optimizer, updater = load_mxnet(), executor._optimizer, executor._updater
    for index, name in optimizer.idx2name.items():
        if name in momentum:
            updater.states[index] = mx.nd.array(momentum[name].numpy())
            updater.states_synced[index] = False  # so that MXNet moves it to the weight's device
