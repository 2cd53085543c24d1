"""The normalization of a box loss, moved from its gradient to its value."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from symbol.graph import Symbol
from symbol.node import Entry, Node
from symbol.ops import find_op
from symbol.passes.rewrite import rewrite, with_inputs


def hoist_bbox_norm(symbol: Symbol) -> Symbol:
    """Move _contrib_BBoxNorm from below a MakeLoss to behind it: the loss gets the value that its gradient means.

    BBoxNorm passes its data on and divides the gradient by (foreground count + 1). Where everything trainable below a
    MakeLoss goes through one BBoxNorm that nothing else uses, dividing the loss itself gives the same gradient.
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


def _hoistable(loss: Node) -> Entry | None:
    """Return the label by which a MakeLoss can be divided, or None."""
    if loss.op != "MakeLoss":
        return None
    below = _below(loss)
    norms = [node for node in below if _is_norm(node)]
    trainable = any(not node.is_variable and find_op(node.op).parameters for node in below)
    if trainable or len(norms) != 1 or norms[0].full_attrs()["normalization"] != "valid":
        return None
    return norms[0].inputs[1]


def _is_norm(node: Node) -> bool:
    return node.op == "_contrib_BBoxNorm"


def _norms_below(loss: Node) -> set[Node]:
    return {node for node in _below(loss) if _is_norm(node)}


def _below(loss: Node) -> set[Node]:
    """Return the nodes below a loss down to variables and to the first BBoxNorm on each path."""
    return _walk([loss], _is_norm)


def _walk(stack: list[Node], stop: Callable[[Node], bool]) -> set[Node]:
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if not stop(node):
                stack.extend(child for child, _ in node.inputs)
    return seen
