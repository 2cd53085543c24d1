"""Symbol: a graph seen from some of its outputs; create, var, Group and Prefix build one.

The language is MXNet's (its op vocabulary, naming and argument order); nothing here needs MXNet or torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from symbol.attributes import nearest
from symbol.json_format import read_json, write_json
from symbol.node import HIDDEN_ATTRIBUTES, VARIABLE, Entry, Node, nodes_below
from symbol.ops import Shape, find_op
from symbol.shape import propagate

_prefix: ContextVar[str] = ContextVar("prefix", default="")


class Symbol:
    """Outputs of a graph, in order. Indexing by position or by output name gives a Symbol of one output."""

    __slots__ = ("entries",)

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries

    def __repr__(self) -> str:
        return f"<Symbol {', '.join(self.list_outputs())}>"

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Symbol]:
        return (Symbol((entry,)) for entry in self.entries)

    def __getitem__(self, key: int | str) -> Symbol:
        if isinstance(key, int):
            return Symbol((self.entries[key],))
        names = self.list_outputs()
        found = [entry for entry, name in zip(self.entries, names, strict=True) if name == key]
        if len(found) != 1:
            problem = "no output" if not found else f"{len(found)} outputs"
            raise ValueError(f"{problem} named '{key}'; index by position, or use one of: {nearest(key, names)}")
        return Symbol((found[0],))

    def __add__(self, other: Symbol) -> Symbol:
        return create("elemwise_add", self, other)

    def __sub__(self, other: Symbol) -> Symbol:
        return create("elemwise_sub", self, other)

    def __mul__(self, other: Symbol | float) -> Symbol:
        if isinstance(other, Symbol):
            return create("elemwise_mul", self, other)
        return create("_mul_scalar", self, scalar=float(other))

    __rmul__ = __mul__

    @property
    def name(self) -> str:
        """The name of the node, for a Symbol of one node."""
        names = {node.name for node, _ in self.entries}
        if len(names) != 1:
            raise ValueError(f"a group of {len(names)} nodes has no single name: {self!r}")
        return names.pop()

    def nodes(self) -> list[Node]:
        """Return every node, in MXNet's order: depth first, inputs before the node that uses them."""
        return nodes_below(self.entries)

    def _auxiliary(self, nodes: list[Node]) -> set[Node]:
        """Return the variables that some node updates in its forward pass (BatchNorm's statistics)."""
        found: set[Node] = set()
        for node in nodes:
            if not node.is_variable:
                first = len(node.inputs) - len(find_op(node.op).auxiliary)
                found.update(child for child, _ in node.inputs[first:])
        return found

    def list_arguments(self) -> list[str]:
        """Return the names of inputs and parameters, in MXNet's order."""
        nodes = self.nodes()
        auxiliary = self._auxiliary(nodes)
        return [node.name for node in nodes if node.is_variable and node not in auxiliary]

    def list_auxiliary_states(self) -> list[str]:
        """Return the names of the states that a forward pass updates, in MXNet's order."""
        nodes = self.nodes()
        auxiliary = self._auxiliary(nodes)
        return [node.name for node in nodes if node in auxiliary]

    def list_inputs(self) -> list[str]:
        """Return the names of the variables that a caller feeds: those that no operator takes as a parameter."""
        nodes = self.nodes()
        parameters: set[Node] = set()
        for node in nodes:
            if not node.is_variable:
                row = find_op(node.op)
                slots = zip(node.inputs, row.input_names(node.full_attrs()), strict=True)
                parameters.update(child for (child, _), slot in slots if slot in row.parameters)
        return [node.name for node in nodes if node.is_variable and node not in parameters]

    def list_outputs(self) -> list[str]:
        """Return one name per output: `<node>_output`, `<node>_<output>`, or the variable's own name."""
        return [node.output_names()[index] for node, index in self.entries]

    def get_internals(self) -> Symbol:
        """Return every visible output of every node, in order."""
        return Symbol(tuple((n, i) for n in self.nodes() for i in range(len(n.output_names()))))

    def attr_dict(self) -> dict[str, dict[str, str]]:
        """Return the hints of every node that has some, e.g. {"bn0_gamma": {"__wd_mult__": "0.0"}}."""
        return {node.name: dict(node.hints) for node in self.nodes() if node.hints}

    def infer_shape(self, **input_shapes: Shape) -> tuple[list[Shape], list[Shape], list[Shape]]:
        """Return the shapes of the arguments, outputs and auxiliary states, each in the order of its list_*.

        A dimension given as 0 is unknown; it stays 0 for an input that nothing depends on. Raises ValueError for
        shapes that contradict each other (naming the node), for a name that is no argument, and where the shape of a
        parameter or output does not follow.
        """
        nodes = self.nodes()
        known = propagate(nodes, input_shapes)
        inputs = self.list_inputs()
        variables = {node.name: known.get((node, 0), ()) for node in nodes if node.is_variable}
        outputs = [known.get(entry, ()) for entry in self.entries]
        required = [(name, shape) for name, shape in variables.items() if name not in inputs]
        required += zip(self.list_outputs(), outputs, strict=True)
        unknown = [name for name, shape in required if not shape or 0 in shape]
        if unknown:
            came = ", ".join(f"{name}={shape}" for name, shape in input_shapes.items()) or "nothing"
            raise ValueError(
                f"the shapes of {', '.join(unknown[:8])} do not follow from {came}; give the shape of "
                f"{', '.join(name for name in inputs if not variables[name] or 0 in variables[name])}"
            )
        arguments, auxiliary = self.list_arguments(), self.list_auxiliary_states()
        return [variables[name] for name in arguments], outputs, [variables[name] for name in auxiliary]

    def tojson(self) -> str:
        """Return the graph as MXNet 1.9 writes it; `load_json` reads it back."""
        return write_json(self.entries)


def load_json(text: str) -> Symbol:
    """Return the graph of a JSON text written by `Symbol.tojson` or by MXNet.

    Raises ValueError for anything else, naming the node and what was expected.
    """
    return Symbol(read_json(text))


def var(
    name: str,
    *,
    shape: Shape | None = None,
    init: str | None = None,
    lr_mult: float | None = None,
    wd_mult: float | None = None,
    attr: Mapping[str, str] | None = None,
) -> Symbol:
    """Create a variable: an input, a parameter or an auxiliary state. The prefix of `Prefix` does not apply.

    shape: a hint for shape inference, 0 for an unknown dimension. init: see `symbol.initializer`.
    """
    if not name or not isinstance(name, str):
        raise ValueError(f"a variable needs a name, a non-empty string; got {name!r}")
    hints = dict(attr or {})
    given = {"__shape__": shape, "__init__": init, "__lr_mult__": lr_mult, "__wd_mult__": wd_mult}
    hints |= {key: str(value) for key, value in given.items() if value is not None}
    return Symbol(((Node(VARIABLE, name, hints=MappingProxyType(hints)), 0),))


def Group(symbols: list[Symbol] | tuple[Symbol, ...]) -> Symbol:
    """Return the outputs of several symbols as one Symbol."""
    if not symbols:
        raise ValueError("Group needs at least one symbol; got none")
    return Symbol(tuple(itertools.chain.from_iterable(symbol.entries for symbol in symbols)))


@contextmanager
def Prefix(prefix: str) -> Iterator[None]:
    """Put `prefix` in front of the names of operators created inside, and of the variables that they create."""
    token = _prefix.set(_prefix.get() + prefix)
    try:
        yield
    finally:
        _prefix.reset(token)


def current_prefix() -> str:
    """Return the prefix that `Prefix` sets here."""
    return _prefix.get()


def create(
    op: str, *args: Symbol, name: str | None = None, attr: Mapping[str, str] | None = None, **kwargs: Any
) -> Symbol:
    """Create a node of `op`.

    Inputs are given by position or by name; parameters that are not given become variables `<name>_<input>`, with the
    node's hints (lr_mult, wd_mult). The default name is `<first input>_<op>`.

    Raises ValueError for an unknown op, input or attribute, or a wrong value, naming the node and what it expected.
    """
    row = find_op(op)
    symbols = {key: value for key, value in kwargs.items() if isinstance(value, Symbol)}
    hidden = {f"__{key}__": str(kwargs[key]) for key in HIDDEN_ATTRIBUTES if kwargs.get(key) is not None}
    plain = {k: v for k, v in kwargs.items() if k not in symbols and k not in HIDDEN_ATTRIBUTES and v is not None}
    if row.variadic:
        plain.setdefault("num_args", len(args) or len(symbols))
    first = args[0] if args else next(iter(symbols.values()), None)
    if name is None and first is None:
        raise ValueError(f"{op}: a node without inputs needs a name")
    name = _prefix.get() + (name or f"{first.entries[0][0].name}_{op.strip('_').lower()}")  # type: ignore[union-attr]
    attrs = row.parse(plain, name)
    slots = row.input_names(row.defaults() | attrs)
    given = _match_inputs(name, op, slots, args, symbols)
    hints = hidden | dict(attr or {})
    entries = []
    for slot in slots:
        if slot in given:
            entries.append(given[slot])
        elif slot in row.parameters:
            entries.append((Node(VARIABLE, f"{name}_{slot}", hints=MappingProxyType(dict(hints))), 0))
        else:
            raise ValueError(f"{op} '{name}': input '{slot}' is missing; it takes {', '.join(slots)}")
    node = Node(row.name, name, tuple(entries), MappingProxyType(attrs), MappingProxyType(hints))
    return Symbol(tuple((node, index) for index in range(len(node.output_names()))))


def _match_inputs(
    name: str, op: str, slots: list[str], args: tuple[Symbol, ...], named: dict[str, Symbol]
) -> dict[str, Entry]:
    if len(args) > len(slots):
        raise ValueError(f"{op} '{name}': takes {len(slots)} inputs ({', '.join(slots)}), got {len(args)}")
    given = dict(zip(slots, args, strict=False))
    for slot, symbol in named.items():
        if slot not in slots:
            raise ValueError(f"{op} '{name}': no input '{slot}'; it takes {', '.join(slots)}")
        if slot in given:
            raise ValueError(f"{op} '{name}': input '{slot}' was given twice")
        given[slot] = symbol
    for slot, symbol in given.items():
        if not isinstance(symbol, Symbol) or len(symbol) != 1:
            raise ValueError(f"{op} '{name}': input '{slot}' must be a Symbol of one output, got {symbol!r}")
    return {slot: symbol.entries[0] for slot, symbol in given.items()}
