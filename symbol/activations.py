"""What autograd keeps of a lowered graph for the backward pass, in bytes, as a function of its input shapes.

A storage is what is kept: views of one tensor share it, and it counts once, however many keep it. Half types follow
from the graph's Casts. Parameters, moving statistics and scalars are not counted. The losses are those of the compiled
operators: their plain references keep more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from symbol.fusion import fuse_losses
from symbol.graph import Entry, Node, Symbol
from symbol.op_table import Shape
from symbol.passes import hoist_bbox_norm
from symbol.shape import propagate

Storage = tuple[Node, int | str]  # the entry that made it; or a tensor that an operator makes for its gradient alone

_BYTES = {"float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "uint8": 1, "int8": 1}  # others: 4
_VIEWS = ("slice_like", "slice_axis", "Reshape", "transpose", "_contrib_BBoxNorm")
_OF_ONE_TYPE = ("Convolution", "BatchNorm", "_contrib_SyncBatchNorm")  # they compute in the type of their data
_LEVEL_LOSSES = ("_contrib_FocalLoss", "_focal_loss_levels", "_smooth_l1_levels")


def as_computed(symbol: Symbol) -> tuple[Symbol, Symbol]:
    """The graph whose shapes can be inferred, and the graph that is lowered: its losses are fused, and scalars."""
    shaped = hoist_bbox_norm(symbol)
    return shaped, fuse_losses(shaped)


@dataclass(frozen=True)
class Activations:
    """The operators in the order in which they are computed, and of each, by its position, what it reads and keeps."""

    operators: list[Node]
    reads: list[set[Storage]]  # activations and inputs of the graph
    keeps: list[set[Storage]]
    multiply_add: list[int]  # of convolutions
    size: Mapping[Storage, int]  # bytes
    made: Mapping[Storage, int]  # the position of the operator that makes it; inputs of the graph have none

    @property
    def kept_bytes(self) -> int:
        """All that the forward pass leaves for the backward pass."""
        return self.bytes_of(set().union(*self.keeps))

    def bytes_of(self, storages: set[Storage]) -> int:
        return sum(self.size[storage] for storage in storages)


def activations(symbol: Symbol, shapes: Mapping[str, Shape], fixed: tuple[str, ...] = ()) -> Activations:
    """Count a training graph at these input shapes.

    fixed: parameters whose names start so have no gradient; what serves only their gradients is not kept.
    """
    shaped, computed = as_computed(symbol)
    return _Count(computed, propagate(shaped, shapes), fixed).result()


class _Count:
    """One walk over the graph, inputs first."""

    def __init__(self, symbol: Symbol, known: Mapping[Entry, Shape], fixed: tuple[str, ...]) -> None:
        self.known = known
        nodes, inputs = symbol.nodes(), set(symbol.list_inputs())
        auxiliary = set(symbol.list_auxiliary_states())
        self.operators = [node for node in nodes if not node.is_variable]
        parameters = {node for node in nodes if node.is_variable and node.name not in inputs}
        self.fed = {node for node in nodes if node.is_variable and node.name in inputs}
        self.with_gradient = {n for n in parameters if n.name not in auxiliary and not n.name.startswith(fixed)}
        self.dtype: dict[Node, str] = {node: "float32" for node in nodes if node.is_variable}
        self.storage: dict[Entry, Storage] = {(node, 0): (node, 0) for node in self.fed}
        self.size: dict[Storage, int] = {(node, 0): self._bytes((node, 0)) for node in self.fed}

    def result(self) -> Activations:
        reads, keeps = [], []
        for node in self.operators:
            self.dtype[node] = self._dtype(node)
            self._place(node)
            if any(child in self.with_gradient for child, _ in node.inputs):
                self.with_gradient.add(node)
            reads.append({self.storage[entry] for entry in node.inputs if entry in self.storage})
            keeps.append(set(self._keeps(node)) if node in self.with_gradient else set())
        positions = {node: position for position, node in enumerate(self.operators)}
        made = {storage: positions[storage[0]] for storage in self.size if storage[0] not in self.fed}
        return Activations(self.operators, reads, keeps, list(map(self._multiply_add, self.operators)), self.size, made)

    def _bytes(self, entry: Entry) -> int:
        return math.prod(self.known.get(entry, (1,))) * _BYTES.get(self.dtype[entry[0]], 4)

    def _dtype(self, node: Node) -> str:
        if node.op == "Cast":
            return str(node.full_attrs()["dtype"])
        if node.op in ("_focal_loss_levels", "_smooth_l1_levels"):
            return "float32"
        data = node.inputs[:1] if node.op in _OF_ONE_TYPE else node.inputs
        found = {self.dtype[child] for child, _ in data}
        return found.pop() if len(found) == 1 else "float32"  # also of float16 and bfloat16 together

    def _place(self, node: Node) -> None:
        """The storages of a node's outputs: its own, or for a view that of its data."""
        source = node.inputs[0]
        same_type = node.op == "Cast" and self.dtype[node] == self.dtype[source[0]]
        copies = node.op == "Reshape" and source[0].op == "transpose"  # which left no order that a view could have
        if (node.op in _VIEWS or same_type) and not copies and source in self.storage:
            self.storage[node, 0] = self.storage[source]
            return
        for index in range(len(node.output_names())):
            self.storage[node, index] = (node, index)
            self.size[node, index] = self._bytes((node, index))

    def _keeps(self, node: Node) -> Iterator[Storage]:
        """Sums, views, casts, upsampling and Concat keep nothing."""
        attrs, data = node.full_attrs(), node.inputs[0]
        if node.op in _OF_ONE_TYPE:
            yield from self._of(data)
            yield from self._keeps_of_parameters(node)
        elif node.op == "Activation":
            yield from self._of(data if attrs["act_type"] in ("softrelu", "softsign") else (node, 0))
            if attrs["act_type"] == "softsign":
                yield self._extra(node, "divisor", self._bytes(data))
        elif node.op == "Pooling" and attrs["pool_type"] == "max":
            yield from self._of(data)
            if attrs["global_pool"]:
                yield (node, 0)
            else:
                yield self._extra(node, "index", 8 * math.prod(self.known[node, 0]))
        elif node.op == "Pooling":
            yield from () if attrs["global_pool"] else self._of(data)
        elif node.op in ("elemwise_mul", "broadcast_mul", "broadcast_div"):
            yield from self._keeps_of_product(node)
        elif node.op in _LEVEL_LOSSES:
            # the gradient of each map, made together with the loss; or the map itself, which is as large
            for number, (child, index) in enumerate(node.inputs):
                if child in self.with_gradient:
                    yield self._extra(node, f"gradient{number}", self._bytes((child, index)))
        elif node.op == "smooth_l1":
            yield from self._of(data)
            for name in ("near", "scaled"):
                yield self._extra(node, name, self._bytes(data))
            yield self._extra(node, "is_near", math.prod(self.known[data]))

    def _keeps_of_parameters(self, node: Node) -> Iterator[Storage]:
        shape = self.known[node.inputs[1]]
        if node.op == "Convolution":
            if self.dtype[node] != "float32":
                yield self._extra(node, "weight", math.prod(shape) * _BYTES.get(self.dtype[node], 4))
        elif not node.full_attrs()["use_global_stats"]:
            yield self._extra(node, "statistics", 8 * math.prod(shape))  # mean and deviation

    def _keeps_of_product(self, node: Node) -> Iterator[Storage]:
        left, right = node.inputs
        if left[0] in self.with_gradient:
            yield from self._of(right)
        if right[0] in self.with_gradient:
            yield from self._of(left)
            yield from self._of(right) if node.op == "broadcast_div" else ()

    def _of(self, entry: Entry) -> Iterator[Storage]:
        if entry in self.storage:
            yield self.storage[entry]

    def _extra(self, node: Node, name: str, size: int) -> Storage:
        self.size[node, name] = size
        return (node, name)

    def _multiply_add(self, node: Node) -> int:
        if node.op != "Convolution":
            return 0
        return math.prod(self.known[node, 0]) * math.prod(self.known[node.inputs[1]][1:])
