"""The walk over a graph that makes a torch.fx.GraphModule of it."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from symbol.graph import Symbol
from symbol.node import Entry, Node
from symbol.ops import Shape, find_op
from symbol.passes import prepare
from symbol.torch_backend.batch_norm import move_statistics
from symbol.torch_backend.parameters import CONSTANT, complete_later, parameters
from symbol.torch_backend.registry import TORCH
from symbol.torch_backend.segment import Segment


def lower(
    symbol: Symbol, *, seed: int | None = 0, recompute: Sequence[tuple[int, int]] = (), **input_shapes: Shape
) -> fx.GraphModule:
    """Return the graph as a module. Called with its inputs by name, it returns the outputs as a list.

    Parameters and auxiliary states are float32 under their MXNet names, initialized by their variables' `__init__` and
    `seed`; None leaves them uninitialized, for weights that are loaded next. Their shapes follow from the graph's own
    hints and from `input_shapes` (0: unknown). Loss operators return scalars: their sum, differentiated, gives the
    gradients that MXNet gives.

    Parameters whose shape does not follow yet are made when the module is first called or loaded from a state_dict.
    torch.export passes inputs to a GraphModule by position, whatever their names: give them in the order of the
    module's signature (`data` first, then that of list_inputs).

    recompute: the segments of a plan of `symbol.memory` for this graph, recomputed by the backward pass. Losses,
    gradients and statistics stay the same, bit for bit.

    Raises ValueError listing every node that cannot be lowered.
    """
    _, fused = prepare(symbol)
    nodes = fused.nodes()
    inputs = sorted(symbol.list_inputs(), key=lambda name: name != "data")
    problems = TORCH.problems(nodes) + [problem for node in nodes if (problem := _unfit_name(node, inputs))]
    if problems:
        raise ValueError("cannot be lowered to torch:\n  " + "\n  ".join(problems))
    root = parameters(symbol, inputs, input_shapes, seed)
    constants = _constants(nodes)
    for name, tensor in constants.values():
        root.register_buffer(name, tensor)
    graph = fx.Graph()
    by_name = {node.name: node for node in nodes if node.is_variable}
    values: dict[Entry, fx.Node] = {(by_name[name], 0): graph.placeholder(name) for name in inputs}
    training = graph.create_node("get_attr", "training")
    segments = _segments(fused, nodes, recompute)
    inside = {node for segment in segments.values() for node in segment.operators}
    for node in nodes:
        if node in segments:
            _emit_segment(graph, root, segments[node], values, training)
        elif node in constants:
            _emit(graph, node, values, training, graph.get_attr(constants[node][0]))
        elif node not in inside and (node, 0) not in values:
            _emit(graph, node, values, training)
    layers = [_moved(node, values) for node in nodes if _moves(node)]
    if layers:
        graph.call_function(move_statistics, (training, layers))
    graph.output([values[entry] for entry in fused.entries])
    if not training.users:
        graph.erase_node(training)
    module = fx.GraphModule(root, graph, "Symbol")
    for name, tensor in constants.values():
        module.register_buffer(name, tensor, persistent=False)  # fx has made it part of the state_dict
    complete_later(module, symbol, inputs, seed)
    return module


def _unfit_name(node: Node, inputs: list[str]) -> str | None:
    """Return the problem with a variable's name, which becomes part of the code that torch.fx writes and executes."""
    if not node.is_variable:
        return None
    name = node.name
    fits = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
    taken = name in ("self", "torch") if name in inputs else hasattr(nn.Module(), name) or name.startswith(CONSTANT)
    return None if fits and not taken else f"variable {name!r}: not usable as a name in Python; rename it"


def _constants(nodes: list[Node]) -> dict[Node, tuple[str, Tensor]]:
    """Return the name and value of each operator's constant. Variables may not have such names: see `_unfit_name`."""
    found: dict[Node, tuple[str, Tensor]] = {}
    for node in nodes:
        constant = None if node.is_variable else TORCH.lowerings[node.op].constant
        if constant is not None:
            found[node] = (f"{CONSTANT}{len(found)}", constant(**node.full_attrs()))
    return found


def _emit(
    graph: fx.Graph, node: Node, values: dict[Entry, fx.Node], training: fx.Node, constant: fx.Node | None = None
) -> None:
    if node.is_variable:
        values[node, 0] = graph.create_node("get_attr", node.name)
        return
    row = find_op(node.op)
    arguments = [values[entry] for entry in node.inputs]
    if row.auxiliary:
        arguments.append(training)
    if constant is not None:
        arguments.append(constant)
    attrs = node.full_attrs()
    result = graph.call_function(TORCH.lowerings[node.op].function, tuple(arguments), attrs)
    visible = row.num_visible(attrs)
    if visible == 1:
        values[node, 0] = result
    else:
        for index in range(visible):
            values[node, index] = graph.call_function(operator.getitem, (result, index))


def _moves(node: Node) -> bool:
    """Return whether a step moves the statistics of this node."""
    return node.op == "_batch_norm" and not node.full_attrs()["use_global_stats"]


def _moved(node: Node, values: dict[Entry, fx.Node]) -> tuple[fx.Node | float | None, ...]:
    """Return what `move_statistics` takes of a layer."""
    attrs = node.full_attrs()
    bias = None if attrs["no_bias"] else values[node.inputs[3]]
    tensors = [values[entry] for entry in [*node.inputs[-2:], (node, 1), (node, 2)]]
    return (*tensors, bias, *(attrs[key] for key in ("momentum", "eps", "sync")))


@dataclass(frozen=True)
class _Run:
    """Consecutive operators that become a Segment."""

    name: str
    operators: list[Node]
    crossing: list[Entry]  # read from the graph's inputs and from operators before
    parameters: list[Entry]
    results: list[Entry]  # used by other operators or outputs of the graph


def _segments(symbol: Symbol, nodes: list[Node], recompute: Sequence[tuple[int, int]]) -> dict[Node, _Run]:
    """Return the segments by their last operator."""
    operators, inputs = [node for node in nodes if not node.is_variable], set(symbol.list_inputs())
    found = {}
    for number, (start, stop) in enumerate(recompute):
        run, others = operators[start:stop], operators[:start] + operators[stop:]
        assert run, f"a segment from {start} to {stop} of {len(operators)} operators"
        members = set(run)
        taken = dict.fromkeys(entry for node in run for entry in node.inputs if entry[0] not in members)
        parameters = [(node, i) for node, i in taken if node.is_variable and node.name not in inputs]
        moved = [(node, index) for node in run if _moves(node) for index in (1, 2)]
        used = dict.fromkeys([*(entry for node in others for entry in node.inputs), *symbol.entries, *moved])
        # a dash: no variable has such a name
        found[run[-1]] = _Run(
            f"segment-{number}",
            run,
            [entry for entry in taken if entry not in parameters],
            parameters,
            [entry for entry in used if entry[0] in members],
        )
    return found


def _emit_segment(graph: fx.Graph, root: nn.Module, run: _Run, values: dict[Entry, fx.Node], training: fx.Node) -> None:
    body = fx.Graph()
    inner_training = body.placeholder("training")
    # not the names of nodes, which would become code
    inner = {entry: body.placeholder(f"x{i}") for i, entry in enumerate([*run.crossing, *run.parameters])}
    for node in run.operators:
        _emit(body, node, inner, inner_training)
    body.output(tuple(inner[entry] for entry in run.results))
    root.add_module(run.name, Segment(fx.GraphModule(nn.Module(), body, "Body")))
    arguments = [tuple(values[entry] for entry in entries) for entries in (run.crossing, run.parameters)]
    called = graph.call_module(run.name, (training, *arguments))
    for index, entry in enumerate(run.results):
        values[entry] = graph.call_function(operator.getitem, (called, index))
