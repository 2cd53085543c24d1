"""Test graphs: batch normalization folded, ReLU and sums fused into convolutions, weights prepared once.

Weights are cast once to the dtype that they are used in. On a CPU, oneDNN's convolutions get them in the layout of its
kernels and compute the sum and the ReLU before they write an output, which torch offers under torch.ops.mkldnn only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from symbol.graph import Symbol
from symbol.passes import fold_batch_norm, fuse_inference
from symbol.torch_backend.elementwise import add_n, require_one_shape
from symbol.torch_backend.lowering import lower
from symbol.torch_backend.nn import cast_weight, convolution
from symbol.torch_backend.registry import lowers


@lowers("_convolution_relu")
def convolution_relu(data: Tensor, weight: Tensor, bias: Tensor | None = None, **attrs: Any) -> Tensor:
    return convolution(data, weight, bias, **attrs).relu_()


@lowers("_convolution_add")
def convolution_add(
    data: Tensor, addend: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool, **attrs: Any
) -> Tensor:
    out = convolution(data, weight, bias, **attrs)
    require_one_shape(out, addend)
    out = out.add_(addend)
    return out.relu_() if relu else out


@lowers("_add_relu")
def add_relu(*terms: Tensor, **_: Any) -> Tensor:
    return add_n(*terms).relu_() if len(terms) > 1 else terms[0].relu()


_CONVOLUTIONS = (convolution, convolution_relu, convolution_add)


class PackedConvolution(nn.Module):
    """A convolution by oneDNN with its weight in the layout of the kernel, which also adds and applies the ReLU.

    The best layout depends on the data's shape: with another one the weight is reordered at each call, which can take
    ten times as long as the convolution. So there is one for each of the last shapes, made when it is first seen.
    """

    KEPT = 2  # landscape and portrait

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: tuple[int, ...],
        pad: tuple[int, ...],
        dilate: tuple[int, ...],
        relu: bool,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.geometry = (pad or (0, 0), stride or (1, 1), dilate or (1, 1), 1)
        self.relu = relu
        self._packed: dict[torch.Size, Tensor] = {}

    def forward(self, data: Tensor, addend: Tensor | None = None) -> Tensor:
        """Return relu(convolution + addend), (N, F, H, W) in channels_last; without ReLU or addend if there is none."""
        ops = torch.ops.mkldnn
        if data.shape not in self._packed:
            if len(self._packed) == self.KEPT:
                del self._packed[next(iter(self._packed))]
            self._packed[data.shape] = ops._reorder_convolution_weight(self.weight, *self.geometry, data.shape)
        weight = self._packed[data.shape]
        data = data.contiguous(memory_format=torch.channels_last)
        out: Tensor
        if addend is not None and addend.shape[2:] != (1, 1):
            addend = addend.contiguous(memory_format=torch.channels_last)
            binary: tuple[Any, ...] = ("add", 1.0, "relu" if self.relu else None, [], "")
            out = ops._convolution_pointwise.binary(data, addend, weight, self.bias, *self.geometry, *binary)
            return out
        unary: tuple[Any, ...] = ("relu" if self.relu and addend is None else "none", [], "")
        out = ops._convolution_pointwise(data, weight, self.bias, *self.geometry, *unary)
        if addend is not None:  # a map of one pixel: torch 2.11 fails to add to it inside the convolution
            out = out.add_(addend)
            out = out.relu_() if self.relu else out
        return out


def lower_for_inference(symbol: Symbol, weights: Mapping[str, Tensor], device: torch.device) -> fx.GraphModule:
    """Return a test graph as a module in evaluation mode on the device, for the dtypes of its casts.

    weights: parameters and auxiliary states by MXNet name; later changes to them do not reach the module, which holds
    weights of its own under names of its own. It computes no gradients. Outputs equal those of `lower` but for
    rounding. Raises ValueError as `lower` does.
    """
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in weights.items()}
    folded, arrays = fold_batch_norm(symbol, arrays)
    fused = fuse_inference(folded)
    module = lower(fused, seed=None)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    module.requires_grad_(False).to(device).eval()
    _cast_once(module)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        _pack_weights(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, parameter in list(module.named_parameters(recurse=False)):
        if name not in used:
            delattr(module, name)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def _cast_once(module: fx.GraphModule) -> None:
    """Replace casts of weights, and those of biases inside convolutions, by parameters of the dtype."""

    def cast(get: fx.Node, dtype: torch.dtype, user: fx.Node) -> fx.Node:
        parameter = module.get_parameter(str(get.target))
        if parameter.dtype == dtype:
            return get
        name = f"{get.target}-{str(dtype).removeprefix('torch.')}"  # a dash: no variable has such a name
        if not hasattr(module, name):
            module.register_parameter(name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        with module.graph.inserting_before(user):
            return module.graph.get_attr(name)

    for node in list(module.graph.nodes):
        if node.target is cast_weight:
            node.replace_all_uses_with(cast(node.args[0], getattr(torch, node.kwargs["dtype"]), node))
            module.graph.erase_node(node)
        elif node.target in _CONVOLUTIONS:
            data, (weight, *bias) = _split(node)
            dtype = module.get_parameter(str(weight.target)).dtype
            node.args = (*data, weight, *(cast(one, dtype, node) for one in bias))


def _split(node: fx.Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the arguments of a convolution that are activations, and its parameters."""
    number = 2 if node.target is convolution_add else 1
    return node.args[:number], node.args[number:]


def _pack_weights(module: fx.GraphModule) -> None:
    """Replace convolutions by `PackedConvolution`, where oneDNN has the dtype of their weights."""
    found = [node for node in module.graph.nodes if node.target in _CONVOLUTIONS]
    for number, node in enumerate(found):
        inputs, parameters = _split(node)
        weight, *bias = (module.get_parameter(arg.target) for arg in parameters)
        if node.kwargs["num_group"] != 1 or not _has_kernels(weight.dtype):
            continue
        geometry = {key: node.kwargs[key] for key in ("stride", "pad", "dilate")}
        relu = node.target is convolution_relu or bool(node.kwargs.get("relu"))
        name = f"packed-{number}"  # a dash: no variable has such a name
        module.add_module(name, PackedConvolution(weight, bias[0] if bias else None, **geometry, relu=relu))
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.call_module(name, inputs))
        module.graph.erase_node(node)


def _has_kernels(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
