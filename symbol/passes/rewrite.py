"""The walk that every pass is written with."""

from __future__ import annotations

from collections.abc import Callable

from symbol.graph import Symbol
from symbol.node import Entry, Node


def rewrite(symbol: Symbol, replace: Callable[[Node, tuple[Entry, ...]], Node | Entry]) -> Symbol:
    """Rebuild a graph from its inputs up.

    `replace(node, inputs)` is called for every operator with its rebuilt inputs. It returns the node to put there, or
    the entry to use in place of the node's first output. Untouched nodes are kept.
    """
    new: dict[Entry, Entry] = {}
    for node in symbol.nodes():
        inputs = tuple(new.get(entry, entry) for entry in node.inputs)
        answer = node if node.is_variable else replace(node, inputs)
        if isinstance(answer, tuple):
            new[node, 0] = answer
        elif answer is not node:
            for index in range(len(answer.output_names())):
                new[node, index] = (answer, index)
    return Symbol(tuple(new.get(entry, entry) for entry in symbol.entries))


def with_inputs(node: Node, inputs: tuple[Entry, ...]) -> Node:
    """Return the node on these inputs: itself, where they are its own."""
    same = all(a is b and i == j for (a, i), (b, j) in zip(node.inputs, inputs, strict=True))
    return node if same else Node(node.op, node.name, inputs, node.attrs, node.hints)
