"""Weights of convolutions that compute in another dtype than that of the stored parameters, float32."""

from __future__ import annotations

from types import MappingProxyType

from symbol.graph import Symbol
from symbol.node import Entry, Node
from symbol.ops import find_op
from symbol.passes.rewrite import rewrite, with_inputs


def cast_weights(symbol: Symbol) -> Symbol:
    """Cast the weight of each convolution in a half type once, also where several convolutions share it.

    The gradients of a shared weight are then added up in the half type, as torch.autocast does with its cached casts.
    """
    dtype: dict[Node, str] = {}
    casts: dict[tuple[Entry, str], Node] = {}

    def replace(node: Node, inputs: tuple[Entry, ...]) -> Node:
        row, full = find_op(node.op), node.full_attrs()
        names = row.input_names(full)
        kind = row.dtype(full, [dtype.get(child, "float32") for child, _ in inputs])
        if "weight" in names and kind in ("float16", "bfloat16"):
            position = names.index("weight")
            weight = inputs[position]
            attrs = MappingProxyType({"dtype": kind})
            cast = casts.setdefault((weight, kind), Node("_cast_weight", f"{weight[0].name}_{kind}", (weight,), attrs))
            inputs = (*inputs[:position], (cast, 0), *inputs[position + 1 :])
        kept = with_inputs(node, inputs)
        dtype[kept] = kind
        return kept

    return rewrite(symbol, replace)
