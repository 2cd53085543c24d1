"""A Symbol as a torch.fx.GraphModule: its inputs become arguments, its parameters keep their MXNet names."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from symbol import torch_ops
from symbol.graph import Entry, Node, Symbol
from symbol.initializer import first_value
from symbol.op_table import Shape, find_op
from symbol.passes import hoist_bbox_norm
from symbol.shape import propagate

LOWERINGS: Mapping[str, Callable[..., Any]] = {
    "Convolution": torch_ops.convolution,
    "BatchNorm": torch_ops.batch_norm,
    "_contrib_SyncBatchNorm": torch_ops.batch_norm,
    "Activation": torch_ops.activation,
    "Pooling": torch_ops.pooling,
    "UpSampling": torch_ops.up_sampling,
    "slice_like": torch_ops.slice_like,
    "slice_axis": torch_ops.slice_axis,
    "add_n": torch_ops.add_n,
    "elemwise_add": torch.add,
    "elemwise_sub": torch.sub,
    "elemwise_mul": torch.mul,
    "broadcast_mul": torch.mul,
    "broadcast_div": torch.div,
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
}


def unsupported(node: Node) -> str | None:
    """What a node asks for that torch is not asked to do, or None."""
    attrs = node.full_attrs()
    checks = {
        "UpSampling": (
            attrs.get("sample_type") == "bilinear" or attrs.get("num_args", 1) > 1,
            "only nearest upsampling of one input",
        ),
        "Pooling": (
            attrs.get("pool_type") in ("lp", "sum")
            or attrs.get("pooling_convention") == "same"
            or attrs.get("count_include_pad") == "False",
            "only max and padded average pooling, convention valid or full",
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


def lower(symbol: Symbol, *, seed: int = 0, **input_shapes: Shape) -> fx.GraphModule:
    """The graph as a module. Called with its inputs by name, it returns the outputs as a list.

    Parameters and auxiliary states are float32 under their MXNet names, initialised by their variables' `__init__` and
    `seed`. Their shapes follow from the graph's own hints and from `input_shapes` (0: unknown). Loss operators return
    scalars: their sum, differentiated, gives the gradients that MXNet gives.

    Parameters whose shape does not follow yet are made when the module is first called or loaded from a state_dict.

    Raises ValueError listing every node that cannot be lowered.
    """
    symbol = hoist_bbox_norm(symbol)
    nodes = symbol.nodes()
    problems = [problem for node in nodes if not node.is_variable and (problem := unsupported(node))]
    if problems:
        raise ValueError("cannot be lowered to torch:\n  " + "\n  ".join(problems))
    inputs = set(symbol.list_inputs())
    root = _parameters(symbol, inputs, input_shapes, seed)
    graph = fx.Graph()
    values: dict[Entry, fx.Node] = {}
    for node in sorted((n for n in nodes if n.name in inputs and n.is_variable), key=lambda n: n.name != "data"):
        values[node, 0] = graph.placeholder(node.name)
    training = graph.create_node("get_attr", "training")
    for node in nodes:
        if (node, 0) not in values:
            _emit(graph, node, values, training)
    graph.output([values[entry] for entry in symbol.entries])
    if not training.users:
        graph.erase_node(training)
    module = fx.GraphModule(root, graph, "Symbol")
    _complete_later(module, symbol, seed)
    return module


def _emit(graph: fx.Graph, node: Node, values: dict[Entry, fx.Node], training: fx.Node) -> None:
    if node.is_variable:
        values[node, 0] = graph.create_node("get_attr", node.name)
        return
    row = find_op(node.op)
    arguments = [values[entry] for entry in node.inputs]
    if row.auxiliary:
        arguments.append(training)
    attrs = {} if LOWERINGS[node.op] in (torch.add, torch.sub, torch.mul, torch.div) else node.full_attrs()
    result = graph.call_function(LOWERINGS[node.op], tuple(arguments), attrs)
    visible = row.num_visible(node.full_attrs())
    if visible == 1:
        values[node, 0] = result
    else:
        for index in range(visible):
            values[node, index] = graph.call_function(operator.getitem, (result, index))


def _parameters(symbol: Symbol, inputs: set[str], input_shapes: Mapping[str, Shape], seed: int) -> nn.Module:
    known = propagate(symbol, input_shapes)
    auxiliary = set(symbol.list_auxiliary_states())
    root = nn.Module()
    for name, node in _parameter_nodes(symbol, inputs).items():
        if hasattr(root, name):
            raise ValueError(f"the variable name '{name}' is taken by torch.nn.Module; rename it")
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


def _parameter_nodes(symbol: Symbol, inputs: set[str]) -> dict[str, Node]:
    return {node.name: node for node in symbol.nodes() if node.is_variable and node.name not in inputs}


def _complete_later(module: fx.GraphModule, symbol: Symbol, seed: int) -> None:
    """Hooks that give uninitialised parameters their shapes, from loaded tensors or from the first call's inputs."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lazy = {name: tensor for name, tensor in tensors if is_lazy(tensor)}
    if not lazy:
        return
    inputs = symbol.list_inputs()
    nodes = _parameter_nodes(symbol, set(inputs))

    def complete(shapes: Mapping[str, Shape]) -> None:
        for name, tensor in lazy.items():
            if is_lazy(tensor) and name in shapes:
                tensor.materialize(shapes[name])
                hint = nodes[name].hints.get("__init__")
                tensor.data.copy_(torch.from_numpy(first_value(name, shapes[name], hint, seed)))

    def before_load(_: nn.Module, state: Mapping[str, Tensor], *__: Any) -> None:
        complete({name: tuple(tensor.shape) for name, tensor in state.items()})

    def before_forward(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        if not any(is_lazy(tensor) for tensor in lazy.values()):
            return
        given = dict(zip(inputs, args, strict=False)) | dict(kwargs)
        known = propagate(symbol, {name: tuple(tensor.shape) for name, tensor in given.items()})
        complete({name: known[node, 0] for name, node in nodes.items() if (node, 0) in known})

    module.register_load_state_dict_pre_hook(before_load)
    module.register_forward_pre_hook(before_forward, with_kwargs=True)
