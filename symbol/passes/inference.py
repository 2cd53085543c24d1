"""Convolutions of a test graph fused with what is done to their outputs, which are then written once."""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType

from symbol.graph import Symbol
from symbol.node import Entry, Node
from symbol.passes.rewrite import rewrite, with_inputs


def fuse_inference(symbol: Symbol) -> Symbol:
    """Replace a convolution, a sum and a ReLU by one operator, where nothing else uses what is between them.

    The new operators are for testing: they save nothing for a backward pass. Values are the same but for rounding: in a
    half type a fused result is rounded once.
    """
    users = Counter(entry for node in symbol.nodes() for entry in node.inputs) + Counter(symbol.entries)
    origin: dict[Node, Node] = {}  # of a rebuilt node: the node of `symbol` whose place it takes

    def alone(entry: Entry) -> bool:
        return users[origin.get(entry[0], entry[0]), entry[1]] == 1

    def sum_into_convolution(node: Node, inputs: tuple[Entry, ...]) -> Node | None:
        """Return one of two convolutions that adds the other term, or None."""
        for (term, index), addend in zip(inputs, reversed(inputs), strict=True):
            if len(inputs) == 2 and term.op == "Convolution" and alone((term, index)):
                data, *parameters = term.inputs
                return Node("_convolution_add", node.name, (data, addend, *parameters), term.attrs)
        return None

    def relu(node: Node, before: Node) -> Node | None:
        attrs = before.attrs
        if before.op == "Convolution":
            return Node("_convolution_relu", node.name, before.inputs, attrs)
        if before.op == "_convolution_add" and not attrs.get("relu"):
            return Node("_convolution_add", node.name, before.inputs, MappingProxyType({**attrs, "relu": True}))
        if before.op in ("add_n", "elemwise_add"):
            num_args = MappingProxyType({"num_args": len(before.inputs)})
            return Node("_add_relu", node.name, before.inputs, num_args)
        return None

    def replace(node: Node, inputs: tuple[Entry, ...]) -> Node:
        fused = None
        if node.op in ("add_n", "elemwise_add"):
            fused = sum_into_convolution(node, inputs)
        elif node.op == "Activation" and node.attrs["act_type"] == "relu" and alone(inputs[0]):
            fused = relu(node, inputs[0][0])
        new = fused or with_inputs(node, inputs)
        origin[new] = node
        return new

    return rewrite(symbol, replace)
