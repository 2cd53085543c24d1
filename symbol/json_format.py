"""MXNet 1.9's JSON of a graph: written so that MXNet loads it, read with everything in the file checked.

Only the nodes and heads of a file are read: the rest (arg_nodes, node_row_ptr) follows from them.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from symbol.attributes import format_value
from symbol.node import HIDDEN_ATTRIBUTES, VARIABLE, Entry, Node, nodes_below
from symbol.ops import find_op

MXNET_VERSION = 10901
_MAX_NODES = 20_000  # the largest model has two thousand; passes take time linear in the nodes
_MAX_CHARACTERS = 1000  # of a name, or of an attribute that an operator reads
_shown = reprlib.Repr().repr  # short, however long or deep the value is


def write_json(entries: Sequence[Entry]) -> str:
    """Return the JSON of the graph with these outputs. Equal graphs give equal texts."""
    nodes = nodes_below(entries)
    number = {node: index for index, node in enumerate(nodes)}
    rows, row_ptr = [], [0]
    for node in nodes:
        attrs = {key: format_value(value) for key, value in node.attrs.items()} | dict(node.hints)
        if not node.is_variable:
            for key, attr in find_op(node.op).attrs.items():
                if attr.always_written:
                    attrs.setdefault(key, format_value(attr.default))
        row: dict[str, Any] = {"op": node.op, "name": node.name}
        if attrs:
            row["attrs"] = attrs
        row["inputs"] = [[number[child], index, 0] for child, index in node.inputs]
        rows.append(row)
        row_ptr.append(row_ptr[-1] + (1 if node.is_variable else len(find_op(node.op).outputs)))
    text = {
        "nodes": rows,
        "arg_nodes": [number[node] for node in nodes if node.is_variable],
        "node_row_ptr": row_ptr,
        "heads": [[number[node], index, 0] for node, index in entries],
        "attrs": {"mxnet_version": ["int", MXNET_VERSION]},
    }
    return json.dumps(text, indent=2)


def read_json(text: str) -> tuple[Entry, ...]:
    """Return the outputs of the graph in a JSON text written here or by MXNet.

    Raises ValueError for anything else, naming the node and what was expected.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a symbol's JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("nodes"), list) or not data.get("heads"):
        raise ValueError("not a symbol's JSON: expected an object with a list 'nodes' and 'heads'")
    if len(data["nodes"]) > _MAX_NODES:
        raise ValueError(f"the graph has {len(data['nodes'])} nodes; expected {_MAX_NODES} at most")
    nodes: list[Node] = []
    for index, row in enumerate(data["nodes"]):
        nodes.append(_read_node(index, row, nodes))
    heads = data["heads"]
    if not isinstance(heads, list):
        raise ValueError(f"heads: expected a list of [node, output, version], got {_shown(heads)}")
    return tuple(_read_entry("heads", head, nodes) for head in heads)


def _read_node(index: int, row: Any, before: list[Node]) -> Node:
    if not isinstance(row, dict) or not isinstance(row.get("op"), str) or not isinstance(row.get("name"), str):
        raise ValueError(f"node {index}: expected an object with the strings 'op' and 'name', got {_shown(row)}")
    op, name = row["op"], row["name"]
    if max(len(op), len(name)) > _MAX_CHARACTERS:
        raise ValueError(
            f"node {index}: 'op' and 'name' have {len(op)} and {len(name)} characters; expected "
            f"{_MAX_CHARACTERS} at most"
        )
    if not (op + name).isprintable():  # they are shown on terminals
        raise ValueError(f"node {index}: 'op' and 'name' must be printable, got {_shown(op)} and {_shown(name)}")
    inputs = row.get("inputs", [])
    attrs: dict[str, str] = {}
    for key in ("param", "attr", "attrs"):  # old files have an operator's attributes in param, hints in attr
        given = row.get(key, {})
        if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
            raise ValueError(f"node '{name}': {key} must map strings to strings, got {_shown(given)}")
        attrs |= {f"__{k}__" if k in HIDDEN_ATTRIBUTES else k: v for k, v in given.items()}
    if not isinstance(inputs, list):
        raise ValueError(f"node '{name}': inputs must be a list of [node, output, version], got {_shown(inputs)}")
    entries = tuple(_read_entry(f"node '{name}'", entry, before) for entry in inputs)
    if op == VARIABLE:
        if entries:
            raise ValueError(f"variable '{name}' has inputs")
        return Node(VARIABLE, name, hints=MappingProxyType(dict(attrs)))
    try:
        op_row = find_op(op)
    except ValueError as error:
        raise ValueError(f"node '{name}': {error}") from None
    hints = {k: v for k, v in attrs.items() if k.startswith("__")}
    plain = {k: v for k, v in attrs.items() if k not in hints}
    if long := [key for key, value in plain.items() if len(key) + len(value) > _MAX_CHARACTERS]:
        raise ValueError(f"{op} '{name}': attribute {_shown(long[0])} is longer than {_MAX_CHARACTERS} characters")
    try:
        typed = op_row.parse(plain, name)
    except ValueError as error:
        raise ValueError(f"{error!s:.1500}") from None  # the message repeats the value, which may be long
    slots = op_row.input_names(op_row.defaults() | typed)
    if len(slots) != len(entries):
        raise ValueError(
            f"{op} '{name}': takes {len(slots)} inputs ({', '.join(slots[:8])}), the file gives {len(entries)}"
        )
    return Node(op_row.name, name, entries, MappingProxyType(typed), MappingProxyType(hints))


def _read_entry(where: str, entry: Any, before: list[Node]) -> Entry:
    valid = isinstance(entry, list) and len(entry) in (2, 3) and all(type(part) is int for part in entry)
    if not valid:
        raise ValueError(f"{where}: expected [node, output, version], got {_shown(entry)}")
    node, output = entry[0], entry[1]
    if not 0 <= node < len(before):
        raise ValueError(
            f"{where}: input node {_shown(node)} does not come before it (there are {len(before)} nodes so far)"
        )
    if not 0 <= output < len(before[node].output_names()):
        raise ValueError(f"{where}: node '{before[node].name}' has no output {_shown(output)}")
    return before[node], output
