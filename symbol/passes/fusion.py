"""Losses fused with the reshapes, transpositions and concatenations of their inputs.

A head's maps are (N, A*C, H, W) logits and (N, 4A, H, W) deltas of every level, with A anchors per cell and C classes.
For MXNet's losses they become one (N, K, C) and one (N, 4A, P). A fused loss reads the maps: nothing of that size is
copied, and the gradient is made in the forward pass. Values and gradients stay; losses become scalars, so shapes must
be inferred before.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from symbol.graph import Symbol
from symbol.node import Entry, Node
from symbol.passes.rewrite import rewrite, with_inputs


def fuse_losses(symbol: Symbol) -> Symbol:
    """Replace focal and box losses by ones that read the levels' maps, where the graph has the models' pattern."""
    box_losses = _box_losses(symbol)

    def replace(node: Node, inputs: tuple[Entry, ...]) -> Node | Entry:
        if node.op == "_contrib_FocalLoss" and (found := _logit_maps(inputs[0])):
            maps, num_class = found
            given = {
                key: node.attrs[key] for key in ("alpha", "gamma", "grad_scale", "normalization") if key in node.attrs
            }
            return _variadic("_focal_loss_levels", node.name, (inputs[1], *maps), given | {"num_class": num_class})
        if node in box_losses:
            weight, smooth = inputs
            ((difference, _),) = smooth[0].inputs
            delta, target = difference.inputs
            scalar = {"scalar": smooth[0].full_attrs()["scalar"]}
            return _variadic("_smooth_l1_levels", node.name, (target, weight, *_delta_maps(delta)), scalar)
        return with_inputs(node, inputs)

    return rewrite(symbol, replace)


def _variadic(op: str, name: str, inputs: tuple[Entry, ...], attrs: Mapping[str, Any]) -> Node:
    return Node(op, name, inputs, MappingProxyType(dict(attrs) | {"num_args": len(inputs)}))


def _levels(entry: Entry, axis: int) -> tuple[Entry, ...]:
    """Return the inputs of a Concat along the axis; without one, the entry alone."""
    node = entry[0]
    return node.inputs if node.op == "Concat" and node.full_attrs()["dim"] == axis else (entry,)


def _before(entry: Entry, op: str, **attrs: Any) -> Entry | None:
    """Return the input of the operator that makes this entry, if it is `op` with these attributes."""
    node, full = entry[0], entry[0].full_attrs() if not entry[0].is_variable else {}
    return node.inputs[0] if node.op == op and all(full[key] == value for key, value in attrs.items()) else None


def _logit_maps(entry: Entry) -> tuple[list[Entry], int] | None:
    """Return the maps (N, A*C, H, W) that are reshaped, transposed and joined to (N, K, C), and C."""
    maps, classes = [], set()
    for level in _levels(entry, 1):
        by_anchor = _before(level, "Reshape", shape=(0, -3, 0), reverse=False)  # (N, A, H*W, C)
        cells = by_anchor and _before(by_anchor, "transpose", axes=(0, 1, 3, 2))  # (N, A, C, H*W)
        level_map = cells and _before(cells, "Reshape", reverse=False)
        if not cells or not level_map:
            return None
        match cells[0].full_attrs()["shape"]:
            case (0, int(A), int(C), -1) if A > 0 and C > 0:
                maps.append(level_map)
                classes.add(C)
            case _:
                return None
    return (maps, classes.pop()) if len(classes) == 1 else None


def _delta_maps(entry: Entry) -> list[Entry]:
    """Return the maps (N, 4A, H, W) that are flattened and joined to (N, 4A, P); none for another pattern."""
    maps = [_before(level, "Reshape", shape=(0, 0, -1), reverse=False) for level in _levels(entry, 2)]
    return [] if None in maps else [m for m in maps if m is not None]


def _box_losses(symbol: Symbol) -> set[Node]:
    """Return the products weight * smooth_l1(deltas - target) of which only the sum is used.

    Weight and target must be inputs of the graph.
    """
    fed = set(symbol.list_inputs())
    users: dict[Node, list[Node]] = {}
    for node in symbol.nodes():
        for child, _ in node.inputs:
            users.setdefault(child, []).append(node)
    heads = {head for head, _ in symbol.entries}

    def is_input(entry: Entry) -> bool:
        return entry[0].is_variable and entry[0].name in fed

    def is_summed(node: Node) -> bool:
        return node not in heads and all(
            _sums(user) or (_divides(user, node) and is_summed(user)) for user in users[node]
        )

    found = set()
    for node in symbol.nodes():
        if node.op != "elemwise_mul" or not is_input(node.inputs[0]):
            continue
        difference = _before(node.inputs[1], "smooth_l1")
        if difference is None or difference[0].op != "elemwise_sub":
            continue
        delta, target = difference[0].inputs
        if is_input(target) and _delta_maps(delta) and is_summed(node):
            found.add(node)
    return found


def _sums(node: Node) -> bool:
    return node.op == "MakeLoss" and node.full_attrs()["normalization"] == "null"


def _divides(node: Node, data: Node) -> bool:
    """Return whether the node divides all of the data (three axes) by one number."""
    if node.op != "broadcast_div" or node.inputs[0][0] is not data:
        return False
    divisor = node.inputs[1][0]
    return divisor.op == "Reshape" and divisor.full_attrs()["shape"] == (1, 1, 1)
