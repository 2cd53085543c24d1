"""Graphs on MXNet's own executor: what the MXNet engine and its checks share. Needs MXNet 1.9 when called."""

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
    """The graph as mx.sym.Symbol, with our operators as MXNet's."""
    return load_mxnet().sym.load_json(graph.tojson())


def with_loss_heads(graph: Symbol) -> Symbol:
    """The graph with a MakeLoss over every focal loss at its head.

    MXNet asks for a head gradient of every output but those of its own losses, which do not include operators of a
    library. MakeLoss is one; its value is that of its input, and the focal loss does not look at the gradient.
    """
    heads = [
        S.MakeLoss(head, name=f"{head.name}_head") if head.entries[0][0].op == "_contrib_FocalLoss" else head
        for head in graph
    ]
    return S.Group(heads)


class RateOfStep:
    """A schedule as MXNet's optimizer asks for it: by the number of its updates, from 1 on, where no `step` is set.

    After a resume the two may differ: another number of images a step counts steps anew.
    """

    def __init__(self, schedule: LrSchedule) -> None:
        self.schedule = schedule
        self.step: int | None = None
        self.base_lr = schedule.lr  # the optimizer sets it

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
    """A mx.mod.Module, bound to one device (by default the CPU), with the weights and statistics of `state`, by name.

    shapes: of all of the graph's inputs; `data` first, the others in the graph's order become its labels.
    fixed: names of parameters that are not trained. dtypes: of inputs that are not float32. watched: names of internal
    outputs that become outputs behind those of the graph; no gradient passes them. grad_req: write, or add where the
    gradients of several backward passes are to be added up.
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
    """The gradients of the module's backward pass: mx.nd.NDArray by parameter name."""
    (executor,) = module._exec_group.execs
    return {name: executor.grad_dict[name] for name in module._param_names if executor.grad_dict[name] is not None}


def statistics_of(module: Any) -> dict[str, Any]:
    """BatchNorm's moving statistics, mx.nd.NDArray by name. BatchNorm's backward pass moves them, and MXNet does not
    know that reading them has to wait for it: everything is waited for."""
    load_mxnet().nd.waitall()
    (executor,) = module._exec_group.execs
    return dict(executor.aux_dict)


def state_of(module: Any) -> dict[str, np.ndarray]:
    """Weights and statistics by name."""
    statistics = statistics_of(module)
    return {name: value.asnumpy() for name, value in {**module.get_params()[0], **statistics}.items()}


def loss_values(graph: Symbol, module: Any, label: np.ndarray) -> list[float]:
    """The losses of the last forward pass, as the lowered graph has them.

    In MXNet _contrib_BBoxNorm divides a loss's gradient, not its value: that is done here.
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
