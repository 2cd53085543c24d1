"""The graph: immutable nodes and the Symbol that looks at some of their outputs.

The language is MXNet's (its op vocabulary, naming and argument order); nothing here needs MXNet or torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from symbol.attributes import nearest
from symbol.op_table import Shape, find_op

VARIABLE = "null"  # MXNet's op name for a variable
HIDDEN_ATTRIBUTES = ("lr_mult", "wd_mult", "ctx_group", "force_mirroring", "mirror_stage")

_prefix: ContextVar[str] = ContextVar("prefix", default="")


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operation or variable. Equality is identity: two equal-looking nodes are two nodes.

    `attrs` holds the typed attributes that were given (defaults stay in the op table); `hints` the `__name__`
    attributes that drive initialisation and the optimiser, as MXNet writes them: strings.
    """

    op: str
    name: str
    inputs: tuple[Entry, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    hints: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def is_variable(self) -> bool:
        return self.op == VARIABLE

    def full_attrs(self) -> dict[str, Any]:
        """The attributes given, and the op table's defaults for the rest."""
        return find_op(self.op).defaults() | dict(self.attrs)

    def output_names(self) -> list[str]:
        """Names of the visible outputs, as list_outputs shows them."""
        if self.is_variable:
            return [self.name]
        row = find_op(self.op)
        return [f"{self.name}_{output}" for output in row.outputs[: row.num_visible(self.full_attrs())]]


Entry = tuple[Node, int]  # an output of a node


class Symbol:
    """Some outputs of a graph, in order. Indexing by position or by output name gives a Symbol of one output."""

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
        """Name of the node, for a Symbol of one node."""
        names = {node.name for node, _ in self.entries}
        if len(names) != 1:
            raise ValueError(f"a group of {len(names)} nodes has no single name: {self!r}")
        return names.pop()

    def nodes(self) -> list[Node]:
        """Every node below, in MXNet's order: depth first, inputs before the node that uses them."""
        order: list[Node] = []
        seen: set[Node] = set()
        for head, _ in self.entries:
            stack = [(head, False)]
            while stack:
                node, done = stack.pop()
                if done:
                    order.append(node)
                elif node not in seen:
                    seen.add(node)
                    stack.append((node, True))
                    stack.extend((child, False) for child, _ in reversed(node.inputs))
        return order

    def _auxiliary(self, nodes: list[Node]) -> set[Node]:
        """Variables that some node updates in its forward pass (BatchNorm's statistics)."""
        found: set[Node] = set()
        for node in nodes:
            if not node.is_variable:
                first = len(node.inputs) - len(find_op(node.op).auxiliary)
                found.update(child for child, _ in node.inputs[first:])
        return found

    def list_arguments(self) -> list[str]:
        """Names of inputs and parameters, in MXNet's order."""
        nodes = self.nodes()
        auxiliary = self._auxiliary(nodes)
        return [node.name for node in nodes if node.is_variable and node not in auxiliary]

    def list_auxiliary_states(self) -> list[str]:
        """Names of the states that a forward pass updates, in MXNet's order."""
        nodes = self.nodes()
        auxiliary = self._auxiliary(nodes)
        return [node.name for node in nodes if node in auxiliary]

    def list_inputs(self) -> list[str]:
        """Names of the variables that a caller feeds: those that no operator takes as a parameter."""
        nodes = self.nodes()
        parameters: set[Node] = set()
        for node in nodes:
            if not node.is_variable:
                names = find_op(node.op).input_names(node.full_attrs())
                kinds = zip(node.inputs, names, strict=True)
                parameters.update(child for (child, _), name in kinds if name in find_op(node.op).parameters)
        return [node.name for node in nodes if node.is_variable and node not in parameters]

    def list_outputs(self) -> list[str]:
        """One name an output: `<node>_output`, `<node>_<output>`, or the variable's own name."""
        return [node.output_names()[index] for node, index in self.entries]

    def get_internals(self) -> Symbol:
        """Every visible output of every node below, in order."""
        return Symbol(tuple((n, i) for n in self.nodes() for i in range(len(n.output_names()))))

    def attr_dict(self) -> dict[str, dict[str, str]]:
        """The hints of every node that has some, e.g. {"bn0_gamma": {"__wd_mult__": "0.0"}}."""
        return {node.name: dict(node.hints) for node in self.nodes() if node.hints}

    def infer_shape(self, **input_shapes: Shape) -> tuple[list[Shape], list[Shape], list[Shape]]:
        """Shapes of the arguments, outputs and auxiliary states, each in the order of its list_*.

        A dimension given as 0 is unknown; so it comes back for an input on which nothing depends. Raises ValueError
        where shapes contradict each other (it names the node), where a name is no argument, and where the shape of a
        parameter or output does not follow.
        """
        from symbol.shape import infer_shape

        return infer_shape(self, input_shapes)

    def tojson(self) -> str:
        """The graph as MXNet 1.9 writes it; `load_json` reads it back."""
        from symbol.json_format import tojson

        return tojson(self)


def var(
    name: str,
    *,
    shape: Shape | None = None,
    init: str | None = None,
    lr_mult: float | None = None,
    wd_mult: float | None = None,
    attr: Mapping[str, str] | None = None,
) -> Symbol:
    """A variable: an input, a parameter or an auxiliary state. The prefix of `Prefix` does not apply.

    shape: a hint for shape inference, 0 for an unknown dimension. init: see `symbol.initializer`.
    """
    if not name or not isinstance(name, str):
        raise ValueError(f"a variable needs a name, a non-empty string; got {name!r}")
    hints = dict(attr or {})
    given = {"__shape__": shape, "__init__": init, "__lr_mult__": lr_mult, "__wd_mult__": wd_mult}
    hints |= {key: str(value) for key, value in given.items() if value is not None}
    return Symbol(((Node(VARIABLE, name, hints=MappingProxyType(hints)), 0),))


def Group(symbols: list[Symbol] | tuple[Symbol, ...]) -> Symbol:
    """Several symbols' outputs as one Symbol."""
    if not symbols:
        raise ValueError("Group needs at least one symbol; got none")
    return Symbol(tuple(itertools.chain.from_iterable(symbol.entries for symbol in symbols)))


@contextmanager
def Prefix(prefix: str) -> Iterator[None]:
    """Operators created inside (and the variables that they create) get this in front of their names."""
    token = _prefix.set(_prefix.get() + prefix)
    try:
        yield
    finally:
        _prefix.reset(token)


def current_prefix() -> str:
    """What `Prefix` puts in front of names here."""
    return _prefix.get()


def create(
    op: str, *args: Symbol, name: str | None = None, attr: Mapping[str, str] | None = None, **kwargs: Any
) -> Symbol:
    """A new node of `op`. Inputs come by position or by name; parameters that are not given become variables
    `<name>_<input>`, with the node's hints (lr_mult, wd_mult). Without a name it is `<first input>_<op>`.

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
