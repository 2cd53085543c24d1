"""Immutable nodes: the graph is the nodes that can be reached from some of their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from symbol.ops import find_op

VARIABLE = "null"  # MXNet's op name for a variable
HIDDEN_ATTRIBUTES = ("lr_mult", "wd_mult", "ctx_group", "force_mirroring", "mirror_stage")


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operation or variable. Equality is identity: two equal-looking nodes are two nodes.

    `attrs` holds the typed attributes that were given (defaults stay in the operator's row); `hints` the `__name__`
    attributes that drive initialization and the optimizer, as MXNet writes them: strings.
    """

    op: str
    name: str
    inputs: tuple[Entry, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    hints: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __repr__(self) -> str:
        return f"<Node {self.op} '{self.name}'>"  # without the inputs: a graph has exponentially many paths

    @property
    def is_variable(self) -> bool:
        return self.op == VARIABLE

    def full_attrs(self) -> dict[str, Any]:
        """Return the attributes given, and the defaults of the rest."""
        return find_op(self.op).defaults() | dict(self.attrs)

    def output_names(self) -> list[str]:
        """Return the names of the visible outputs, as list_outputs shows them."""
        if self.is_variable:
            return [self.name]
        row = find_op(self.op)
        return [f"{self.name}_{output}" for output in row.outputs[: row.num_visible(self.full_attrs())]]


Entry = tuple[Node, int]  # an output of a node


def nodes_below(entries: Sequence[Entry]) -> list[Node]:
    """Return every node that the entries depend on, in MXNet's order: depth first, inputs before their users."""
    order: list[Node] = []
    seen: set[Node] = set()
    for head, _ in entries:
        stack = [(head, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((child, False) for child, _ in reversed(node.inputs))
    return order
