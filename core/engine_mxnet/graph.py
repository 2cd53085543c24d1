"""Graphs on MXNet's executor, for the MXNet engine and its tests. Needs MXNet 1.9 when called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

import symbol as S
from core.engine.schedule import LrSchedule
from operator_cxx.mxnet_ops import load_mxnet
from symbol import Symbol

if TYPE_CHECKING:
    from config.schema import Config


def load_symbol(graph: Symbol) -> Any:
    """Return the graph as mx.sym.Symbol, with our operators loaded into MXNet."""
    return load_mxnet().sym.load_json(graph.tojson())


def with_loss_heads(graph: Symbol) -> Symbol:
    """Return the graph with a MakeLoss on every focal loss among its outputs.

    MXNet requires a head gradient for every output except those of its own losses, which operators of a library are
    not. MakeLoss is one; its value is that of its input, and the focal loss ignores its head gradient.
    """
    heads = [
        S.MakeLoss(head, name=f"{head.name}_head") if head.entries[0][0].op == "_contrib_FocalLoss" else head
        for head in graph
    ]
    return S.Group(heads)


class MxnetLrScheduler:
    """A schedule as MXNet's LRScheduler: the rate of `step`, or if that is None of the optimizer's number of updates.

    Updates count from 1. After a resume the two may differ, as step numbers change with the global batch size.
    """

    def __init__(self, schedule: LrSchedule) -> None:
        self.schedule = schedule
        self.step: int | None = None
        self.base_lr = schedule.lr  # written by the optimizer

    def __call__(self, num_update: int) -> float:
        return self.schedule.lr_at(num_update - 1 if self.step is None else self.step)


def bind_module(
    graph: Symbol,
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, np.ndarray],
    *,
    context: Any = None,
    fixed: Sequence[str] = (),
    training: bool = True,
    dtypes: Mapping[str, str] = MappingProxyType({}),
    watched: Sequence[str] = (),
    grad_req: str = "write",
) -> Any:
    """Return a mx.mod.Module, bound to one device (by default the CPU), with the weights and statistics of `state`.

    shapes: those of all of the graph's inputs; all but `data` become labels, in the graph's order.
    fixed: names of parameters that are not trained. dtypes: of inputs that are not float32. watched: names of internal
    outputs that are appended to the graph's; no gradient passes through them. grad_req: write, or add to accumulate the
    gradients of several backward passes.
    """
    mx = load_mxnet()
    labels = [name for name in graph.list_inputs() if name != "data"]
    symbol = load_symbol(with_loss_heads(graph) if training else graph)
    if watched:
        internals = symbol.get_internals()
        symbol = mx.sym.Group([symbol, *(mx.sym.BlockGrad(internals[name]) for name in watched)])
    module = mx.mod.Module(
        symbol,
        data_names=["data"],
        label_names=labels,
        context=[context or mx.cpu()],
        fixed_param_names=list(fixed),
    )
    described = [mx.io.DataDesc(name, shapes[name], dtypes.get(name, "float32")) for name in ["data", *labels]]
    module.bind(described[:1], described[1:] or None, for_training=training, grad_req=grad_req)
    auxiliary = set(graph.list_auxiliary_states())
    arrays = {name: mx.nd.array(value, dtype=value.dtype) for name, value in state.items()}
    module.init_params(
        arg_params={name: value for name, value in arrays.items() if name not in auxiliary},
        aux_params={name: value for name, value in arrays.items() if name in auxiliary},
    )
    return module


def gradients_of(module: Any) -> dict[str, Any]:
    """Return the gradients of the module's backward pass: mx.nd.NDArray by parameter name."""
    (executor,) = module._exec_group.execs
    return {name: executor.grad_dict[name] for name in module._param_names if executor.grad_dict[name] is not None}


def statistics_of(module: Any) -> dict[str, Any]:
    """Return BatchNorm's moving statistics, mx.nd.NDArray by name. BatchNorm's backward pass updates them without a
    dependency that MXNet knows of, so this waits for all running operators."""
    load_mxnet().nd.waitall()
    (executor,) = module._exec_group.execs
    return dict(executor.aux_dict)


def state_of(module: Any) -> dict[str, np.ndarray]:
    """Return weights and statistics by name."""
    statistics = statistics_of(module)
    return {name: value.asnumpy() for name, value in {**module.get_params()[0], **statistics}.items()}


def loss_values(graph: Symbol, module: Any, label: np.ndarray) -> list[float]:
    """Return the losses of the last forward pass, equal to those of the lowered graph.

    In MXNet _contrib_BBoxNorm divides the gradient of a loss, but not its value: that is divided here.
    """
    divisor = float((label >= 1).sum() + 1)
    outputs = module.get_outputs()[: len(graph)]
    values = [float(output.asnumpy().sum(dtype=np.float64)) for output in outputs]
    normed = [any(node.op == "_contrib_BBoxNorm" for node in head.nodes()) for head in graph]
    return [value / divisor if is_normed else value for value, is_normed in zip(values, normed, strict=True)]


def contexts(config: Config, most: int | None = None) -> list[Any]:
    """Return MXNet's devices on this machine: the first `most` (None: all) of KvstoreParam.gpus, or of as many CPU
    devices as KvstoreParam.processes says.

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
