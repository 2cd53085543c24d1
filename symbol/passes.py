"""Graph to graph: pure functions that rewrite a Symbol and leave the one that they were given."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Literal

from symbol.graph import Entry, Node, Symbol


def rewrite(symbol: Symbol, replace: Callable[[Node, tuple[Entry, ...]], Node | Entry]) -> Symbol:
    """Rebuild a graph from its inputs up.

    `replace(node, inputs)` gets every operator with its rebuilt inputs and answers with the node to put there, or with
    the entry to use in place of its first output. Untouched nodes are kept.
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
    """The node on these inputs: itself, where they are its own."""
    same = all(a is b and i == j for (a, i), (b, j) in zip(node.inputs, inputs, strict=True))
    return node if same else Node(node.op, node.name, inputs, node.attrs, node.hints)


def in_precision(symbol: Symbol, precision: Literal["float32", "float16", "bfloat16"]) -> Symbol:
    """The same graph with another type where it says float16; for float32 without its casts from and to float16."""
    if precision == "float16":
        return symbol

    def replace(node: Node, inputs: tuple[Entry, ...]) -> Node | Entry:
        kept = with_inputs(node, inputs)
        if node.op != "Cast":
            return kept
        if precision == "float32":
            return inputs[0] if node.attrs["dtype"] in ("float16", "float32") else kept
        if node.attrs["dtype"] == "float16":
            return Node(node.op, node.name, inputs, MappingProxyType({**node.attrs, "dtype": precision}), node.hints)
        return kept

    return rewrite(symbol, replace)


def hoist_bbox_norm(symbol: Symbol) -> Symbol:
    """Move _contrib_BBoxNorm from under a MakeLoss to behind it: then the loss has the value that its gradient means.

    BBoxNorm passes its data on and divides the gradient by (foreground count + 1). Where everything trainable under a
    MakeLoss goes through one BBoxNorm, which serves nothing else, dividing the loss itself gives the same gradient.
    """
    labels = {node: label for node in symbol.nodes() if (label := _hoistable(node)) is not None}
    elsewhere = _walk([head for head, _ in symbol.entries], lambda node: node in labels)
    labels = {loss: label for loss, label in labels.items() if not _norms_below(loss) & elsewhere}
    hoisted = {norm for loss in labels for norm in _norms_below(loss)}

    def replace(node: Node, inputs: tuple[Entry, ...]) -> Node | Entry:
        if node in hoisted:
            return inputs[0]
        kept = with_inputs(node, inputs)
        if node in labels:
            return Node("_foreground_mean", f"{node.name}_mean", ((kept, 0), labels[node]), MappingProxyType({}))
        return kept

    return rewrite(symbol, replace) if labels else symbol


def _norms_below(loss: Node) -> set[Node]:
    return {node for node in _below(loss) if node.op == "_contrib_BBoxNorm"}


def _below(loss: Node) -> set[Node]:
    """The nodes under a loss down to variables and to the first BBoxNorm on each path."""
    return _walk([loss], lambda node: node.op == "_contrib_BBoxNorm")


def _walk(stack: list[Node], stop: Callable[[Node], bool]) -> set[Node]:
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if not stop(node):
                stack.extend(child for child, _ in node.inputs)
    return seen


def _hoistable(loss: Node) -> Entry | None:
    if loss.op != "MakeLoss":
        return None
    below = _below(loss)
    norms = [node for node in below if node.op == "_contrib_BBoxNorm" and node.full_attrs()["normalization"] == "valid"]
    trainable = any(node.op in ("Convolution", "BatchNorm", "_contrib_SyncBatchNorm") for node in below)
    if len(norms) != 1 or trainable or len(_norms_below(loss)) != 1:
        return None
    return norms[0].inputs[1]
