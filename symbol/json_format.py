"""MXNet 1.9's JSON of a graph: written so that MXNet loads it, read with every claim of the file checked."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

from symbol.attributes import format_value
from symbol.graph import HIDDEN_ATTRIBUTES, VARIABLE, Entry, Node, Symbol
from symbol.op_table import find_op

MXNET_VERSION = 10901


def tojson(symbol: Symbol) -> str:
    """The text of a graph. Equal graphs give equal texts."""
    nodes = symbol.nodes()
    number = {node: index for index, node in enumerate(nodes)}
    rows, row_ptr = [], [0]
    for node in nodes:
        attrs = {key: format_value(value) for key, value in node.attrs.items()} | dict(node.hints)
        row: dict[str, Any] = {"op": node.op, "name": node.name}
        if attrs:
            row["attrs"] = attrs
        row["inputs"] = [[number[child], index, 0] for child, index in node.inputs]
        rows.append(row)
        row_ptr.append(row_ptr[-1] + _num_outputs(node))
    text = {
        "nodes": rows,
        "arg_nodes": [number[node] for node in nodes if node.is_variable],
        "node_row_ptr": row_ptr,
        "heads": [[number[node], index, 0] for node, index in symbol.entries],
        "attrs": {"mxnet_version": ["int", MXNET_VERSION]},
    }
    return json.dumps(text, indent=2)


def load_json(text: str) -> Symbol:
    """The graph of a JSON text written here or by MXNet.

    Raises ValueError for what is no such graph: it names the node and what was expected.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a symbol's JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("nodes"), list) or not data.get("heads"):
        raise ValueError("not a symbol's JSON: expected an object with a list 'nodes' and 'heads'")
    nodes: list[Node] = []
    for index, row in enumerate(data["nodes"]):
        nodes.append(_read_node(index, row, nodes))
    heads = data["heads"]
    if not isinstance(heads, list):
        raise ValueError(f"heads: expected a list of [node, output, version], got {heads!r}")
    return Symbol(tuple(_read_entry("heads", head, nodes) for head in heads))


def _num_outputs(node: Node) -> int:
    return 1 if node.is_variable else len(find_op(node.op).outputs)


def _read_node(index: int, row: Any, before: list[Node]) -> Node:
    if not isinstance(row, dict) or not isinstance(row.get("op"), str) or not isinstance(row.get("name"), str):
        raise ValueError(f"node {index}: expected an object with the strings 'op' and 'name', got {str(row)[:80]}")
    op, name = row["op"], row["name"]
    inputs = row.get("inputs", [])
    attrs: dict[str, str] = {}
    for key in ("param", "attr", "attrs"):  # old files: the operator's in param, hints in attr
        given = row.get(key, {})
        if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
            raise ValueError(f"node '{name}': {key} must map strings to strings, got {str(given)[:80]}")
        attrs |= {f"__{k}__" if k in HIDDEN_ATTRIBUTES else k: v for k, v in given.items()}
    if not isinstance(inputs, list):
        raise ValueError(f"node '{name}': inputs must be a list of [node, output, version], got {str(inputs)[:80]}")
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
    typed = op_row.parse({k: v for k, v in attrs.items() if k not in hints}, name)
    slots = op_row.input_names(op_row.defaults() | typed)
    if len(slots) != len(entries):
        raise ValueError(
            f"{op} '{name}': takes {len(slots)} inputs ({', '.join(slots)}), the file gives {len(entries)}"
        )
    return Node(op_row.name, name, entries, MappingProxyType(typed), MappingProxyType(hints))


def _read_entry(where: str, entry: Any, before: list[Node]) -> Entry:
    valid = isinstance(entry, list) and len(entry) in (2, 3) and all(type(part) is int for part in entry)
    if not valid:
        raise ValueError(f"{where}: expected [node, output, version], got {str(entry)[:80]}")
    node, output = entry[0], entry[1]
    if not 0 <= node < len(before):
        raise ValueError(f"{where}: input node {node} does not come before it (there are {len(before)} nodes so far)")
    if not 0 <= output < len(before[node].output_names()):
        raise ValueError(f"{where}: node '{before[node].name}' has no output {output}")
    return before[node], output
