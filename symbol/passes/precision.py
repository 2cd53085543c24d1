"""The dtype of a graph's half-precision part."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from symbol.graph import Symbol
from symbol.node import Entry, Node
from symbol.passes.rewrite import rewrite, with_inputs


def in_precision(symbol: Symbol, precision: Literal["float32", "float16", "bfloat16"]) -> Symbol:
    """Replace float16 in a graph's casts by another dtype; for float32 remove the casts from and to float16."""
    if precision == "float16":
        return symbol

    def replace(node: Node, inputs: tuple[Entry, ...]) -> Node | Entry:
        kept = with_inputs(node, inputs)
        if node.op != "Cast":
            return kept
        if precision == "float32":
            return inputs[0] if node.attrs["dtype"] in ("float16", "float32") else kept
        if node.attrs["dtype"] == "float16":
            return Node(node.op, node.name, inputs, MappingProxyType({**node.attrs, "dtype": precision}), node.hints)
        return kept

    return rewrite(symbol, replace)
