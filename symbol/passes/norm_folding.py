"""Batch normalization folded into convolutions, for testing and export. F filters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from symbol.graph import Symbol
from symbol.node import VARIABLE, Entry, Node
from symbol.passes.rewrite import rewrite, with_inputs

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def fold_batch_norm(symbol: Symbol, weights: Mapping[str, np.ndarray]) -> tuple[Symbol, dict[str, np.ndarray]]:
    """Return a test graph without the batch normalizations that follow a convolution, and its weights.

    A normalization by moving statistics is linear, so that a convolution whose output it alone uses can do its work:

        scale = gamma / sqrt(moving_var + eps)
        weight' = weight * scale,  bias' = beta + (bias - moving_mean) * scale

    computed in float64 and rounded once to the type of the weight. The convolution takes the place and the name of the
    normalization, and its weight and bias become `<name>_weight` and `<name>_bias`: a weight that several
    normalizations share is folded into each of them. Casts between the two stay, behind the convolution.

    symbol: the graph to test, with nothing of training in it; weights: its parameters and auxiliary states by name.
    Both are left as they are; arrays that do not change are shared. Outputs are the same but for rounding.
    """
    users = Counter(entry for node in symbol.nodes() for entry in node.inputs) + Counter(symbol.entries)
    taken = {node.name for node in symbol.nodes() if node.is_variable}
    made: dict[str, np.ndarray] = {}

    def variable(name: str, value: np.ndarray) -> Entry:
        while name in taken:
            name = f"folded_{name}"  # the ending says what a parameter is
        taken.add(name)
        made[name] = value
        return Node(VARIABLE, name), 0

    def replace(node: Node, inputs: tuple[Entry, ...]) -> Node | Entry:
        path = _path_to_convolution(node, users)
        if not path or any(child.name not in weights for child, _ in (*path[0].inputs[1:], *node.inputs[1:])):
            return with_inputs(node, inputs)
        convolution, *casts = path
        weight, bias = _folded(node, convolution, weights)
        data = _rebuilt_data(inputs[0][0], len(casts))
        attrs = {**convolution.attrs, "no_bias": False}
        name = node.name if not casts else f"{node.name}_conv"
        entries = (data, variable(f"{node.name}_weight", weight), variable(f"{node.name}_bias", bias))
        folded = Node(convolution.op, name, entries, MappingProxyType(attrs))
        for cast in casts:
            name = node.name if cast is casts[-1] else cast.name
            folded = Node(cast.op, name, ((folded, 0),), cast.attrs)
        return folded

    folded = rewrite(symbol, replace)
    every = {**weights, **made}
    names = [*folded.list_arguments(), *folded.list_auxiliary_states()]
    return folded, {name: every[name] for name in names if name in every}


def _path_to_convolution(node: Node, users: Counter[Entry]) -> list[Node]:
    """Return the convolution that a normalization can be folded into, and the casts between them; [] if none can."""
    if node.op not in ("BatchNorm", "_contrib_SyncBatchNorm") or node.full_attrs()["output_mean_var"]:
        return []
    path: list[Node] = []
    entry = node.inputs[0]
    while users[entry] == 1:
        path.insert(0, entry[0])
        if entry[0].op == "Convolution":
            return path
        if entry[0].op != "Cast" or entry[0].attrs["dtype"] not in _FLOATS:
            return []
        entry = entry[0].inputs[0]
    return []


def _rebuilt_data(node: Node, num_casts: int) -> Entry:
    """Return the data of the convolution in the graph that is being rebuilt, `num_casts` above a node of it."""
    for _ in range(num_casts):
        node = node.inputs[0][0]
    return node.inputs[0]


def _folded(node: Node, convolution: Node, weights: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight (F, C, h, w) and the bias (F,) of a convolution with the normalization that follows it."""
    weight, *bias = (weights[child.name] for child, _ in convolution.inputs[1:])
    gamma, beta, mean, variance = (weights[child.name].astype(np.float64) for child, _ in node.inputs[1:])
    attrs = node.full_attrs()
    scale = (1.0 if attrs["fix_gamma"] else gamma) / np.sqrt(variance + attrs["eps"])  # (F,)
    shift = beta + ((bias[0].astype(np.float64) if bias else 0.0) - mean) * scale
    return (weight * scale[:, None, None, None]).astype(weight.dtype), shift.astype(weight.dtype)
