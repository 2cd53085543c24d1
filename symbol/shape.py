"""Shape inference over a graph, forwards and backwards: the operators' rules until nothing changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from symbol.attributes import Attr, nearest
from symbol.node import Entry, Node
from symbol.ops import Shape, find_op
from symbol.ops.row import MaybeShape, Shapes
from symbol.ops.rules import merge

_MAX_DIMS = 32  # MXNet's graphs have five
_MAX_PASSES = 50  # the models need three or four


def propagate(nodes: list[Node], given: Mapping[str, Shape]) -> dict[Entry, Shape]:
    """Infer the shapes of a graph's nodes (inputs before their users) from those of some variables.

    Returns what is known of every entry, hidden outputs included, with unknown dimensions as 0.
    """
    known = _given_shapes(nodes, given)
    nodes = [node for node in nodes if not node.is_variable]
    for _ in range(_MAX_PASSES):
        changed = False
        for node in nodes:
            changed |= _apply(node, known)
        if not changed:
            return known
        nodes.reverse()  # a shape travels up or down a whole chain in one pass
    raise ValueError(f"the shapes are still changing after {_MAX_PASSES} passes over the graph: give more of them")


def _given_shapes(nodes: list[Node], given: Mapping[str, Shape]) -> dict[Entry, Shape]:
    variables = [node for node in nodes if node.is_variable]
    names = Counter(node.name for node in variables)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(
            f"several variables are named {', '.join(twice[:8])}; give each its own name, or use one twice"
        )
    for name in given:
        if name not in names:
            raise ValueError(f"no argument '{name}'; nearest: {nearest(name, names)}")
    known: dict[Entry, Shape] = {}
    for node in variables:
        hint = node.hints.get("__shape__")
        shape: MaybeShape = _read_shape(node.name, hint) if hint else None
        try:
            shape = merge(shape, _read_shape(node.name, given[node.name]) if node.name in given else None)
        except ValueError as error:
            raise ValueError(f"variable '{node.name}': {error}") from None
        if shape is not None:
            known[node, 0] = shape
    return known


def _read_shape(name: str, value: Any) -> Shape:
    try:
        shape = Attr("ints").parse(value)
    except ValueError:
        shape = (-1,)
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape of '{name}' must be whole numbers (0: unknown), got {value}")
    return shape


def _apply(node: Node, known: dict[Entry, Shape]) -> bool:
    """Merge what the node's rule says into `known`; return whether that changed it."""
    row = find_op(node.op)
    outputs: list[Entry] = [(node, index) for index in range(len(row.outputs))]
    ins: Shapes = [known.get(entry) for entry in node.inputs]
    outs: Shapes = [known.get(entry) for entry in outputs]
    attrs = node.full_attrs()
    slots = row.input_names(attrs)
    try:
        inferred_ins, inferred_outs = row.shapes(attrs, ins, outs)
    except ValueError as error:
        came = ", ".join(f"{slot} {shape}" for slot, shape in zip(slots, ins, strict=True))
        raise ValueError(f"{node.op} '{node.name}': {error!s:.500} (inputs: {came:.500})") from None
    changed = False
    labels = [*slots, *row.outputs]
    for label, entry, inferred in zip(labels, [*node.inputs, *outputs], [*inferred_ins, *inferred_outs], strict=True):
        before = known.get(entry)
        if inferred is not None and (len(inferred) > _MAX_DIMS or max(inferred, default=0) >= 2**63):
            raise ValueError(
                f"{node.op} '{node.name}': '{label}' would have {len(inferred)} sides; expected {_MAX_DIMS} at most, "
                "each below 2^63"
            )
        try:
            merged = merge(before, inferred)
        except ValueError:
            raise ValueError(f"{node.op} '{node.name}': '{label}' should be {inferred}, but it is {before}") from None
        if merged is not None and merged != before:
            known[entry] = merged
            changed = True
    return changed
