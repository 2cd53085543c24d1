"""The graph: MXNet's symbols without MXNet. See `symbol.op_table` for the vocabulary."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from symbol.graph import Group, Node, Prefix, Symbol, create, var
from symbol.json_format import load_json

if TYPE_CHECKING:
    from torch.fx import GraphModule

__all__ = ["Group", "Node", "Prefix", "Symbol", "create", "load_json", "lower", "var"]


def lower(
    symbol: Symbol, *, seed: int = 0, recompute: Sequence[tuple[int, int]] = (), **input_shapes: tuple[int, ...]
) -> "GraphModule":
    """The graph as a torch module; see `symbol.lowering.lower`. Only this needs torch."""
    from symbol.lowering import lower as lower_to_torch

    return lower_to_torch(symbol, seed=seed, recompute=recompute, **input_shapes)


def __getattr__(op: str) -> Any:
    """Every operator of the vocabulary is a function: symbol.Cast(data, dtype="float32", name="cast")."""
    import functools

    from symbol.op_table import ALIASES, OPS

    if op not in OPS and op not in ALIASES:
        raise AttributeError(f"module 'symbol' has no attribute '{op}'")
    return functools.partial(create, op)
