"""The graph: MXNet's symbols without MXNet. It never computes anything: that is left to a back end.

symbol.ops              the vocabulary, one row per operator; each is a function here: symbol.Cast(data, dtype=...)
symbol.graph            Symbol and what builds one: create, var, Group, Prefix, load_json
symbol.layers           short forms of the vocabulary for the models
symbol.passes           graph to graph
symbol.memory           the activations of a training step, and which of them to recompute
symbol.torch_backend    graph to torch.nn.Module: lower
symbol.onnx_backend     test graph to ONNX: export, emit
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from symbol.graph import Group, Prefix, Symbol, create, load_json, var
from symbol.node import Node
from symbol.ops import ALIASES, OPS

if TYPE_CHECKING:
    from torch.fx import GraphModule

__all__ = ["Group", "Node", "Prefix", "Symbol", "create", "load_json", "lower", "var"]


def lower(
    symbol: Symbol, *, seed: int = 0, recompute: Sequence[tuple[int, int]] = (), **input_shapes: tuple[int, ...]
) -> "GraphModule":
    """Return the graph as a torch module; see `symbol.torch_backend.lower`. Only this needs torch."""
    from symbol.torch_backend import lower as lower_to_torch

    return lower_to_torch(symbol, seed=seed, recompute=recompute, **input_shapes)


def __getattr__(op: str) -> Any:
    if op not in OPS and op not in ALIASES:
        raise AttributeError(f"module 'symbol' has no attribute '{op}'")
    return partial(create, op)
