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
        kept = with_inputs(node, inputs)
        if node.op == "Convolution" and dtype.get(inputs[0][0], "float32") in ("float16", "bfloat16"):
            data, weight, *bias = inputs
            kind = dtype[data[0]]
            cast = casts.setdefault(
                (weight, kind),
                Node("_cast_weight", f"{weight[0].name}_{kind}", (weight,), MappingProxyType({"dtype": kind})),
            )
            kept = with_inputs(node, (data, (cast, 0), *bias))
        dtype[kept] = find_op(node.op).dtype(kept.full_attrs(), [dtype.get(child, "float32") for child, _ in inputs])
        return kept

    return rewrite(symbol, replace)
