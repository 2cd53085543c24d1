"""The parameters and auxiliary states of a lowered graph, under their MXNet names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from symbol.graph import Symbol
from symbol.initializer import first_value
from symbol.node import Node
from symbol.ops import Shape
from symbol.shape import propagate

CONSTANT = "_constant"  # the prefix of buffers that are constants, not states


def parameters(symbol: Symbol, inputs: list[str], input_shapes: Mapping[str, Shape], seed: int | None) -> nn.Module:
    """Return a module with the graph's parameters and auxiliary states, without storage where no shape follows."""
    known = propagate(symbol.nodes(), input_shapes)
    auxiliary = set(symbol.list_auxiliary_states())
    root = nn.Module()
    for name, node in _parameter_nodes(symbol, inputs).items():
        tensor: Tensor
        shape = known.get((node, 0), (0,))
        if 0 in shape:
            tensor = UninitializedBuffer() if name in auxiliary else UninitializedParameter()
        else:
            tensor = _first_tensor(node, shape, seed)
            tensor = tensor if name in auxiliary else nn.Parameter(tensor)
        if name in auxiliary:
            root.register_buffer(name, tensor)
        else:
            root.register_parameter(name, tensor)  # type: ignore[arg-type]
    return root


def _first_tensor(node: Node, shape: Shape, seed: int | None) -> Tensor:
    """Return the initial value of a parameter; without a seed, memory to load it into."""
    if seed is None:
        return torch.empty(shape)
    return torch.from_numpy(first_value(node.name, shape, node.hints.get("__init__"), seed))


def _parameter_nodes(symbol: Symbol, inputs: list[str]) -> dict[str, Node]:
    return {node.name: node for node in symbol.nodes() if node.is_variable and node.name not in inputs}


def _tensors(module: nn.Module, lazy: bool) -> dict[str, Any]:
    """Return parameters and auxiliary states, those with a shape or those without."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: t for name, t in named if is_lazy(t) == lazy and not name.startswith(CONSTANT)}


def complete_later(module: fx.GraphModule, symbol: Symbol, inputs: list[str], seed: int | None) -> None:
    """Install hooks that materialize uninitialized parameters when a state_dict is loaded or at the first call."""
    nodes = _parameter_nodes(symbol, inputs)

    def complete(module: nn.Module, given: Mapping[str, Shape]) -> None:
        made = {name: tuple(tensor.shape) for name, tensor in _tensors(module, lazy=False).items()}
        known = propagate(symbol.nodes(), made | dict(given))
        for name, tensor in _tensors(module, lazy=True).items():
            shape = known.get((nodes[name], 0), (0,))
            if 0 not in shape:
                tensor.materialize(shape)
                tensor.data.copy_(_first_tensor(nodes[name], shape, seed))
        if not _tensors(module, lazy=True):
            for hook in hooks:
                hook.remove()

    def before_load(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        given = {name: state.get(prefix + name) for name in _tensors(module, lazy=True)}
        complete(module, {name: tuple(tensor.shape) for name, tensor in given.items() if tensor is not None})

    def before_forward(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        given = dict(zip(inputs, args, strict=False)) | dict(kwargs)
        complete(module, {name: tuple(tensor.shape) for name, tensor in given.items()})

    if _tensors(module, lazy=True):
        hooks = [
            module.register_load_state_dict_pre_hook(before_load),
            module.register_forward_pre_hook(before_forward, with_kwargs=True),
        ]
