"""Shape inference over a graph, forwards and backwards: the rules of `symbol.shape_rules` until nothing changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from symbol.attributes import Attr, nearest
from symbol.graph import Entry, Node, Symbol
from symbol.op_table import Shape, find_op
from symbol.shape_rules import RULES, MaybeShape, Shapes, merge

_MOST_DIMS = 32  # MXNet's graphs have five
_MOST_PASSES = 50  # ours need three or four


def infer_shape(symbol: Symbol, given: Mapping[str, Shape]) -> tuple[list[Shape], list[Shape], list[Shape]]:
    """(argument, output, auxiliary) shapes; see `Symbol.infer_shape`."""
    known = propagate(symbol, given)
    inputs = symbol.list_inputs()
    variables = {node.name: known.get((node, 0), ()) for node in symbol.nodes() if node.is_variable}
    open_names = [name for name, shape in variables.items() if name not in inputs and (not shape or 0 in shape)]
    outputs = [known.get(entry, ()) for entry in symbol.entries]
    open_names += [name for name, shape in zip(symbol.list_outputs(), outputs, strict=True) if not shape or 0 in shape]
    if open_names:
        came = ", ".join(f"{name}={shape}" for name, shape in given.items()) or "nothing"
        raise ValueError(
            f"the shapes of {', '.join(open_names[:8])} do not follow from {came}; give the shape of "
            f"{', '.join(name for name in inputs if not variables[name] or 0 in variables[name])}"
        )
    arguments, auxiliary = symbol.list_arguments(), symbol.list_auxiliary_states()
    return [variables[name] for name in arguments], outputs, [variables[name] for name in auxiliary]


def propagate(symbol: Symbol, given: Mapping[str, Shape]) -> dict[Entry, Shape]:
    """What is known of every entry, unknown dimensions as 0. Hidden outputs are included."""
    nodes = symbol.nodes()
    known = _start(nodes, given)
    nodes = [node for node in nodes if not node.is_variable]
    for _ in range(_MOST_PASSES):
        changed = False
        for node in nodes:
            changed |= _apply(node, known)
        if not changed:
            return known
        nodes.reverse()  # what is known goes up or down a whole chain in one pass
    raise ValueError(f"the shapes are still changing after {_MOST_PASSES} passes over the graph: give more of them")


def _start(nodes: list[Node], given: Mapping[str, Shape]) -> dict[Entry, Shape]:
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
    row = find_op(node.op)
    outputs: list[Entry] = [(node, index) for index in range(len(row.outputs))]
    ins: Shapes = [known.get(entry) for entry in node.inputs]
    outs: Shapes = [known.get(entry) for entry in outputs]
    slots = row.input_names(node.full_attrs())
    try:
        said_ins, said_outs = RULES[node.op](node.full_attrs(), ins, outs)
    except ValueError as error:
        came = ", ".join(f"{slot} {shape}" for slot, shape in zip(slots, ins, strict=True))
        raise ValueError(f"{node.op} '{node.name}': {error!s:.500} (inputs: {came:.500})") from None
    changed = False
    labels = [*slots, *row.outputs]
    for label, entry, said in zip(labels, [*node.inputs, *outputs], [*said_ins, *said_outs], strict=True):
        had = known.get(entry)
        if said is not None and (len(said) > _MOST_DIMS or max(said, default=0) >= 2**63):
            raise ValueError(
                f"{node.op} '{node.name}': '{label}' would have {len(said)} sides; expected {_MOST_DIMS} at most, "
                "each below 2^63"
            )
        try:
            merged = merge(had, said)
        except ValueError:
            raise ValueError(f"{node.op} '{node.name}': '{label}' should be {said}, but it is {had}") from None
        if merged is not None and merged != had:
            known[entry] = merged
            changed = True
    return changed
