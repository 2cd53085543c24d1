"""Batch normalization with what surrounds it: the bias before, the sum with a residual and the ReLU behind.

A normalization subtracts the mean of its data, so the bias of the convolution before it has no effect in training and
no gradient: it shifts the moving mean, which is what testing subtracts.
"""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType
from typing import Any

from symbol.graph import Symbol
from symbol.node import Entry, Node
from symbol.passes.rewrite import rewrite, with_inputs

_NORMS = ("BatchNorm", "_contrib_SyncBatchNorm")


def fuse_batch_norm(symbol: Symbol) -> Symbol:
    """Replace every normalization by one `_batch_norm`, joined with its neighbours where nothing else uses them.

    Parameters keep their names. A bias that is joined gets no gradient, where it had one of rounding errors.
    """
    uses = Counter([entry for node in symbol.nodes() for entry in node.inputs] + list(symbol.entries))

    def replace(node: Node, inputs: tuple[Entry, ...]) -> Node:
        if node.op in _NORMS and not node.full_attrs()["output_mean_var"]:
            return _normalization(node, inputs, joins_bias=uses[node.inputs[0]] == 1)
        if node.op == "Activation" and node.attrs["act_type"] == "relu" and uses[node.inputs[0]] == 1:
            return _with_relu(node, inputs[0], uses) or with_inputs(node, inputs)
        return with_inputs(node, inputs)

    return rewrite(symbol, replace)


def without_gradient(symbol: Symbol) -> set[str]:
    """Return the names of the parameters that only shift moving statistics, in a graph that `fuse_batch_norm` made."""
    biases: set[Node] = set()
    others: set[Node] = set()
    for node in symbol.nodes():
        for position, (child, _) in enumerate(node.inputs):
            is_bias = node.op == "_batch_norm" and position == 3 and not node.full_attrs()["no_bias"]
            (biases if is_bias else others).add(child)
    return {node.name for node in biases - others}


def _normalization(node: Node, inputs: tuple[Entry, ...], joins_bias: bool) -> Node:
    full = node.full_attrs()
    attrs = {key: full[key] for key in ("eps", "momentum", "fix_gamma", "use_global_stats")}
    data, gamma, beta, *moving = inputs
    bias: tuple[Entry, ...] = ()
    conv = data[0]
    if joins_bias and conv.op == "Convolution" and not conv.full_attrs()["no_bias"] and not full["use_global_stats"]:
        *kept, one = conv.inputs
        bias = (one,)
        data = (Node(conv.op, conv.name, tuple(kept), MappingProxyType({**conv.attrs, "no_bias": True}), conv.hints), 0)
    attrs |= {"sync": node.op == "_contrib_SyncBatchNorm", "no_bias": not bias}
    return _make(node, (data, gamma, beta, *bias, *moving), attrs)


def _with_relu(node: Node, data: Entry, uses: Counter[Entry]) -> Node | None:
    """Return relu(norm) or relu(norm + residual) as one node, if the ReLU's rebuilt input `data` is such."""
    norm, _ = data
    if norm.op == "_batch_norm":
        return _make(node, norm.inputs, {**norm.attrs, "relu": True})
    terms = norm.inputs
    if norm.op not in ("elemwise_add", "add_n") or len(terms) != 2 or terms[0] == terms[1]:
        return None
    for position, (term, original) in enumerate(zip(terms, node.inputs[0][0].inputs, strict=True)):
        if _is_plain(term[0]) and uses[original] == 1:
            *parameters, mean, variance = term[0].inputs
            attrs = {**term[0].attrs, "relu": True, "no_residual": False}
            return _make(node, (*parameters, terms[1 - position], mean, variance), attrs)
    return None


def _is_plain(node: Node) -> bool:
    return node.op == "_batch_norm" and not node.attrs.get("relu", False)


def _make(node: Node, inputs: tuple[Entry, ...], attrs: dict[str, Any]) -> Node:
    return Node("_batch_norm", node.name, inputs, MappingProxyType(attrs), node.hints)
