"""A Symbol as a torch.fx.GraphModule: its inputs become arguments, its parameters keep their MXNet names."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from symbol import torch_ops
from symbol.activations import as_computed
from symbol.graph import Entry, Node, Symbol
from symbol.initializer import first_value
from symbol.op_table import Shape, find_op
from symbol.segment import Segment
from symbol.shape import propagate
from symbol.sync_batch_norm import sync_batch_norm

LOWERINGS: Mapping[str, Callable[..., Any]] = {
    "Convolution": torch_ops.convolution,
    "BatchNorm": torch_ops.batch_norm,
    "_contrib_SyncBatchNorm": sync_batch_norm,
    "Activation": torch_ops.activation,
    "Pooling": torch_ops.pooling,
    "UpSampling": torch_ops.up_sampling,
    "slice_like": torch_ops.slice_like,
    "slice_axis": torch_ops.slice_axis,
    "add_n": torch_ops.add_n,
    "elemwise_add": torch_ops.elemwise_add,
    "elemwise_sub": torch_ops.elemwise_sub,
    "elemwise_mul": torch_ops.elemwise_mul,
    "broadcast_mul": torch_ops.broadcast_mul,
    "broadcast_div": torch_ops.broadcast_div,
    "_mul_scalar": torch_ops.mul_scalar,
    "Reshape": torch_ops.reshape,
    "transpose": torch_ops.transpose,
    "Concat": torch_ops.concat,
    "Cast": torch_ops.cast,
    "smooth_l1": torch_ops.smooth_l1,
    "MakeLoss": torch_ops.make_loss,
    "_contrib_FocalLoss": torch_ops.focal_loss,
    "_contrib_BBoxNorm": torch_ops.bbox_norm,
    "_contrib_GenAnchor": torch_ops.gen_anchor,
    "_contrib_GenProposalRetina": torch_ops.gen_proposal_retina,
    "_foreground_mean": torch_ops.foreground_mean,
    "_focal_loss_levels": torch_ops.focal_loss_levels,
    "_smooth_l1_levels": torch_ops.smooth_l1_levels,
}

# Operators that take one more argument: a tensor that follows from their attributes, kept on the module's device.
CONSTANTS: Mapping[str, Callable[..., Tensor]] = {"_contrib_GenAnchor": torch_ops.gen_anchor_base}


_CONSTANT = "_constant"


def unsupported(node: Node) -> str | None:
    """What a node asks for that torch is not asked to do, or None."""
    if node.is_variable:
        return None
    attrs = node.full_attrs()
    checks = {
        "UpSampling": (
            attrs.get("sample_type") == "bilinear" or attrs.get("num_args", 1) > 1,
            "only nearest upsampling of one input",
        ),
        "Pooling": (
            attrs.get("pool_type") in ("lp", "sum")
            or attrs.get("pooling_convention") == "same"
            or attrs.get("count_include_pad") == "False"
            or any(
                2 * pad > kernel for pad, kernel in zip(attrs.get("pad", ()), attrs.get("kernel", ()), strict=False)
            ),
            "only max and padded average pooling, convention valid or full, padded by half the kernel at most",
        ),
        "BatchNorm": (attrs.get("output_mean_var"), "output_mean_var"),
        "_contrib_SyncBatchNorm": (attrs.get("output_mean_var"), "output_mean_var"),
        "Reshape": (not attrs.get("shape"), "an empty shape"),
        "_contrib_GenProposalRetina": (
            attrs.get("iou_loss")
            or attrs.get("batch_wise_anchor")
            or not attrs.get("output_one_hot", True)
            or any(attrs.get("anchor_mean", ()))
            or set(attrs.get("anchor_std", ())) - {1.0},
            "only plain deltas (anchor_mean 0, anchor_std 1), one-hot scores, one anchor set",
        ),
    }
    refused, reason = checks.get(node.op, (False, ""))
    return f"{node.op} '{node.name}': {reason}" if refused else None


def _unfit_name(node: Node, inputs: list[str]) -> str | None:
    """A problem with a variable's name: it becomes part of the code that torch.fx writes and executes."""
    if not node.is_variable:
        return None
    name = node.name
    fits = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
    taken = name in ("self", "torch") if name in inputs else hasattr(nn.Module(), name) or name.startswith(_CONSTANT)
    return None if fits and not taken else f"variable {name!r}: not usable as a name in Python; rename it"


def lower(
    symbol: Symbol, *, seed: int = 0, recompute: Sequence[tuple[int, int]] = (), **input_shapes: Shape
) -> fx.GraphModule:
    """The graph as a module. Called with its inputs by name, it returns the outputs as a list.

    Parameters and auxiliary states are float32 under their MXNet names, initialised by their variables' `__init__` and
    `seed`. Their shapes follow from the graph's own hints and from `input_shapes` (0: unknown). Loss operators return
    scalars: their sum, differentiated, gives the gradients that MXNet gives.

    Parameters whose shape does not follow yet are made when the module is first called or loaded from a state_dict.
    To torch.export give the inputs in the order of the module's signature (`data` first, then that of list_inputs): it
    hands them to a GraphModule by position, whatever their names.

    recompute: the segments of a plan of `symbol.recompute` for this graph; in training the backward pass computes them
    again. Losses, gradients and statistics stay, bit for bit.

    Raises ValueError listing every node that cannot be lowered.
    """
    symbol, fused = as_computed(symbol)
    nodes = fused.nodes()
    inputs = sorted(symbol.list_inputs(), key=lambda name: name != "data")
    problems = [problem for node in nodes if (problem := unsupported(node) or _unfit_name(node, inputs))]
    if problems:
        raise ValueError("cannot be lowered to torch:\n  " + "\n  ".join(problems))
    root = _parameters(symbol, inputs, input_shapes, seed)
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
    graph.output([values[entry] for entry in fused.entries])
    if not training.users:
        graph.erase_node(training)
    module = fx.GraphModule(root, graph, "Symbol")
    for name, tensor in constants.values():
        module.register_buffer(name, tensor, persistent=False)  # fx has made it part of the state_dict
    _complete_later(module, symbol, inputs, seed)
    return module


def _constants(nodes: list[Node]) -> dict[Node, tuple[str, Tensor]]:
    """The name and value of each operator's constant. Variables may not have such names: see `_unfit_name`."""
    users = [node for node in nodes if node.op in CONSTANTS]
    return {node: (f"{_CONSTANT}{i}", CONSTANTS[node.op](**node.full_attrs())) for i, node in enumerate(users)}


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
    result = graph.call_function(LOWERINGS[node.op], tuple(arguments), attrs)
    visible = row.num_visible(node.full_attrs())
    if visible == 1:
        values[node, 0] = result
    else:
        for index in range(visible):
            values[node, index] = graph.call_function(operator.getitem, (result, index))


@dataclass(frozen=True)
class _Run:
    """Operators in a row that become a Segment."""

    name: str
    operators: list[Node]
    crossing: list[Entry]  # what they take of the graph's inputs and of operators before
    parameters: list[Entry]
    results: list[Entry]  # what is used of them elsewhere


def _segments(symbol: Symbol, nodes: list[Node], recompute: Sequence[tuple[int, int]]) -> dict[Node, _Run]:
    """The segments by their last operator."""
    operators, inputs = [node for node in nodes if not node.is_variable], set(symbol.list_inputs())
    found = {}
    for number, (start, stop) in enumerate(recompute):
        run, others = operators[start:stop], operators[:start] + operators[stop:]
        assert run, f"a segment from {start} to {stop} of {len(operators)} operators"
        members = set(run)
        taken = dict.fromkeys(entry for node in run for entry in node.inputs if entry[0] not in members)
        parameters = [(node, i) for node, i in taken if node.is_variable and node.name not in inputs]
        used = dict.fromkeys([*(entry for node in others for entry in node.inputs), *symbol.entries])
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
    # names of nodes would become code
    inner = {entry: body.placeholder(f"x{i}") for i, entry in enumerate([*run.crossing, *run.parameters])}
    for node in run.operators:
        _emit(body, node, inner, inner_training)
    body.output(tuple(inner[entry] for entry in run.results))
    root.add_module(run.name, Segment(fx.GraphModule(nn.Module(), body, "Body")))
    arguments = [tuple(values[entry] for entry in entries) for entries in (run.crossing, run.parameters)]
    called = graph.call_module(run.name, (training, *arguments))
    for index, entry in enumerate(run.results):
        values[entry] = graph.call_function(operator.getitem, (called, index))


def _parameters(symbol: Symbol, inputs: list[str], input_shapes: Mapping[str, Shape], seed: int) -> nn.Module:
    known = propagate(symbol, input_shapes)
    auxiliary = set(symbol.list_auxiliary_states())
    root = nn.Module()
    for name, node in _parameter_nodes(symbol, inputs).items():
        tensor: Tensor
        shape = known.get((node, 0), (0,))
        if 0 in shape:
            tensor = UninitializedBuffer() if name in auxiliary else UninitializedParameter()
        else:
            tensor = torch.from_numpy(first_value(name, shape, node.hints.get("__init__"), seed))
            tensor = tensor if name in auxiliary else nn.Parameter(tensor)
        if name in auxiliary:
            root.register_buffer(name, tensor)
        else:
            root.register_parameter(name, tensor)  # type: ignore[arg-type]
    return root


def _parameter_nodes(symbol: Symbol, inputs: list[str]) -> dict[str, Node]:
    return {node.name: node for node in symbol.nodes() if node.is_variable and node.name not in inputs}


def _tensors(module: nn.Module, lazy: bool) -> dict[str, Any]:
    """Parameters and auxiliary states."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: t for name, t in named if is_lazy(t) == lazy and not name.startswith(_CONSTANT)}


def _complete_later(module: fx.GraphModule, symbol: Symbol, inputs: list[str], seed: int) -> None:
    """Hooks that give uninitialised parameters their shapes, from loaded tensors or from the first call's inputs."""
    nodes = _parameter_nodes(symbol, inputs)

    def complete(module: nn.Module, given: Mapping[str, Shape]) -> None:
        made = {name: tuple(tensor.shape) for name, tensor in _tensors(module, lazy=False).items()}
        known = propagate(symbol, made | dict(given))
        for name, tensor in _tensors(module, lazy=True).items():
            shape = known.get((nodes[name], 0), (0,))
            if 0 not in shape:
                tensor.materialize(shape)
                hint = nodes[name].hints.get("__init__")
                tensor.data.copy_(torch.from_numpy(first_value(name, shape, hint, seed)))
        if not _tensors(module, lazy=True):
            for hook in hooks:
                hook.remove()

    def before_load(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        given = {name: state.get(prefix + name) for name in _tensors(module, lazy=True)}
        complete(module, {name: tuple(tensor.shape) for name, tensor in given.items() if tensor is not None})

    def before_forward(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        given = dict(zip(inputs, args, strict=False)) | dict(kwargs)
        complete(module, {name: tuple(tensor.shape) for name, tensor in given.items()})

    if _tensors(module, lazy=True):
        hooks = [
            module.register_load_state_dict_pre_hook(before_load),
            module.register_forward_pre_hook(before_forward, with_kwargs=True),
        ]
