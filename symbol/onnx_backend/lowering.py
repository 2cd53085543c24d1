"""The walk over a graph that writes it as ONNX."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto

from symbol.graph import Symbol
from symbol.node import Entry
from symbol.onnx_backend.registry import ONNX
from symbol.onnx_backend.writer import Value, Writer
from symbol.ops import Shape, find_op
from symbol.passes import fold_batch_norm, in_precision
from symbol.shape import propagate


def export(symbol: Symbol, weights: Mapping[str, np.ndarray], **input_shapes: Shape) -> ModelProto:
    """Return a test graph as an ONNX model in float32 with the graph's own inputs and outputs.

    input_shapes: of every input; the first dimension of each is the batch size and may be anything when the model runs.
    For weights and errors see `emit`.
    """
    writer = Writer()
    inputs = {name: writer.input(name, "float32", (-1, *shape[1:])) for name, shape in input_shapes.items()}
    names = symbol.list_outputs()
    for name, value in zip(names, emit(writer, symbol, weights, inputs), strict=True):
        writer.output(name, value)
    return writer.model(names[0], {})


def emit(writer: Writer, symbol: Symbol, weights: Mapping[str, np.ndarray], inputs: Mapping[str, Value]) -> list[Value]:
    """Write the nodes of a test graph, batch normalization folded, and return its outputs.

    weights: parameters and auxiliary states by name; they become constants in float32, in which the graph computes,
    whatever its casts say. inputs: a float32 value for each input, with the batch size N as first dimension.

    Raises ValueError listing every node that ONNX has no function for, and for weights that are missing or of another
    network.
    """
    graph, arrays = fold_batch_norm(in_precision(symbol, "float32"), weights)
    nodes = graph.nodes()
    if problems := ONNX.problems(nodes):
        raise ValueError(
            "cannot be exported to ONNX:\n  " + "\n  ".join(problems) + "\nWrite a function for each operator in "
            "symbol/onnx_backend, decorated with `lowers`, or export a part of the graph that has none of them"
        )
    shapes = _free_shapes(graph, {name: value.shape for name, value in inputs.items()})
    missing = [node.name for node in nodes if node.is_variable and node.name not in {**arrays, **inputs}]
    if missing:
        raise ValueError(f"no value for {', '.join(missing[:8])}: give weights for all parameters, and all inputs")
    for node in nodes:
        if node.is_variable and node.name not in inputs and arrays[node.name].shape != shapes[node, 0]:
            came = arrays[node.name].shape
            raise ValueError(f"the graph needs {node.name} {shapes[node, 0]}, got {came}: give weights of this network")
    values: dict[Entry, Value] = {}
    for node in nodes:
        if node.is_variable:
            given = inputs.get(node.name)
            values[node, 0] = given or Value(writer.constant(arrays[node.name], name=node.name), shapes[node, 0])
            continue
        writer.scope = node.name
        row, attrs = find_op(node.op), node.full_attrs()
        arguments = [values[entry] for entry in node.inputs]
        result = ONNX.lowerings[node.op].function(writer, *arguments, out_shape=shapes[node, 0], **attrs)
        names = [result] if isinstance(result, str) else list(result)
        assert len(names) == row.num_visible(attrs), f"{node.op} has {len(names)} outputs in ONNX"
        dtype = row.dtype(attrs, [value.dtype for value in arguments])
        for index, name in enumerate(names):
            values[node, index] = Value(name, shapes[node, index], dtype)
    return [values[entry] for entry in graph.entries]


def _free_shapes(graph: Symbol, inputs: Mapping[str, Shape]) -> dict[Entry, Shape]:
    """Return the shape of every entry as in `Value`: those for one image and for two say which sides depend on N.

    Raises ValueError where a side depends on N in another way than as a multiple of it.
    """
    one, two = (
        propagate(graph.nodes(), {name: tuple(-k * N if k < 0 else k for k in shape) for name, shape in inputs.items()})
        for N in (1, 2)
    )
    found = {}
    for entry, shape in one.items():
        if any(b not in (a, 2 * a) for a, b in zip(shape, two[entry], strict=True)):
            raise ValueError(
                f"{entry[0].op} '{entry[0].name}' has the shape {shape} for one image and {two[entry]} for two: only "
                "sides that are multiples of the batch size can be exported"
            )
        found[entry] = tuple(a if a == b else -a for a, b in zip(shape, two[entry], strict=True))
    return found
