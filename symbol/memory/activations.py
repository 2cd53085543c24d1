"""The tensors that autograd saves of a lowered graph for the backward pass, in bytes, from its input shapes.

Storages are counted: views of one tensor share a storage, which counts once, however many save it. Half precision
follows from the graph's Casts. Parameters, moving statistics and scalars are not counted. The losses are those of the
compiled operators: their plain references save more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from symbol.graph import Symbol
from symbol.node import Entry, Node
from symbol.ops import Op, Shape, find_op
from symbol.ops.row import Call, Extra, Input, Saved, itemsize
from symbol.passes import prepare
from symbol.shape import propagate

Storage = tuple[Node, int | str]  # the entry that made it, or an operator and the name of an `Extra` of its row


@dataclass(frozen=True)
class Activations:
    """The operators in the order in which they run, and per operator the storages that it reads and saves."""

    operators: list[Node]
    reads: list[set[Storage]]  # activations and inputs of the graph
    saves: list[set[Storage]]
    multiply_add: list[int]
    size: Mapping[Storage, int]  # bytes
    made: Mapping[Storage, int]  # the position of the operator that makes it; inputs of the graph have none
    joined: Mapping[str, str]  # an operator that a pass joined with those behind it: the name of the one they became

    @property
    def kept_bytes(self) -> int:
        """The bytes that the forward pass leaves for the backward pass."""
        return self.bytes_of(set().union(*self.saves))

    def bytes_of(self, storages: set[Storage]) -> int:
        return sum(self.size[storage] for storage in storages)


def count_activations(symbol: Symbol, shapes: Mapping[str, Shape], fixed: tuple[str, ...] = ()) -> Activations:
    """Count a training graph at these input shapes.

    fixed: prefixes of the names of parameters without gradient; what serves only their gradients is not saved.
    """
    shaped, lowered = prepare(symbol)
    return _Count(lowered, propagate(shaped.nodes(), shapes), fixed, _joined(symbol, lowered)).result()


def _joined(symbol: Symbol, lowered: Symbol) -> dict[str, str]:
    """Return the names of a graph that its lowered form lacks, each with the name of the next operator that is left."""
    left = {node.name for node in lowered.nodes()}
    becomes: dict[str, str] = {}
    for node in reversed(symbol.nodes()):
        for child, _ in node.inputs:
            if child.name not in left:
                becomes.setdefault(child.name, becomes.get(node.name, node.name))
    return becomes


class _Count:
    """One walk over the graph, inputs first."""

    def __init__(
        self, symbol: Symbol, known: Mapping[Entry, Shape], fixed: tuple[str, ...], joined: Mapping[str, str]
    ) -> None:
        nodes, inputs = symbol.nodes(), set(symbol.list_inputs())
        auxiliary = set(symbol.list_auxiliary_states())
        variables = [node for node in nodes if node.is_variable]
        self.known = known
        self.joined = joined
        self.operators = [node for node in nodes if not node.is_variable]
        self.fed = {node for node in variables if node.name in inputs}
        self.with_gradient = {
            node
            for node in variables
            if node not in self.fed and node.name not in auxiliary and not node.name.startswith(fixed)
        }
        self.dtype: dict[Node, str] = dict.fromkeys(variables, "float32")
        self.storage: dict[Entry, Storage] = {(node, 0): (node, 0) for node in self.fed}
        self.size: dict[Storage, int] = {(node, 0): self._bytes((node, 0)) for node in self.fed}

    def result(self) -> Activations:
        reads: list[set[Storage]] = []
        saves: list[set[Storage]] = []
        multiply_add = []
        for node in self.operators:
            row = find_op(node.op)
            call = self._call(node, row)
            self.dtype[node] = call.dtype
            self._place(node, row, call)
            reads.append({self.storage[entry] for entry in node.inputs if entry in self.storage})
            saves.append(set())
            multiply_add.append(row.multiply_adds(call.inputs, call.output))
            if any(call.needs_grad):
                self.with_gradient.add(node)
                storages = [self._storage(node, saved) for saved in row.saves(call)]
                saves[-1].update(storage for storage in storages if storage is not None)
        positions = {node: position for position, node in enumerate(self.operators)}
        made = {storage: positions[storage[0]] for storage in self.size if storage[0] not in self.fed}
        return Activations(self.operators, reads, saves, multiply_add, self.size, made, self.joined)

    def _shape(self, entry: Entry) -> Shape:
        return self.known.get(entry, (1,))

    def _bytes(self, entry: Entry) -> int:
        return math.prod(self._shape(entry)) * itemsize(self.dtype[entry[0]])

    def _call(self, node: Node, row: Op) -> Call:
        attrs = node.full_attrs()
        dtypes = [self.dtype[child] for child, _ in node.inputs]
        return Call(
            attrs=attrs,
            inputs=[self._shape(entry) for entry in node.inputs],
            output=self._shape((node, 0)),
            input_dtypes=dtypes,
            dtype=row.dtype(attrs, dtypes),
            needs_grad=[child in self.with_gradient for child, _ in node.inputs],
            producers=[child.op for child, _ in node.inputs],
        )

    def _place(self, node: Node, row: Op, call: Call) -> None:
        """Set the storages of a node's outputs: its own, or for a view that of its first input."""
        source = node.inputs[0]
        if row.is_view(call) and source in self.storage:
            self.storage[node, 0] = self.storage[source]
            return
        for index in range(len(node.output_names())):
            self.storage[node, index] = (node, index)
            self.size[node, index] = self._bytes((node, index))

    def _storage(self, node: Node, saved: Saved) -> Storage | None:
        """Return the storage of a saved tensor; parameters have none."""
        if isinstance(saved, Extra):
            self.size[node, saved.name] = saved.num_bytes
            return node, saved.name
        entry = node.inputs[saved.position] if isinstance(saved, Input) else (node, saved.position)
        return self.storage.get(entry)
