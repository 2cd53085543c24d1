"""Convolution, activation, pooling, upsampling. N images, C channels, H, W.

A function takes its inputs in order and its full attributes by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from symbol.ops.nn import is_common_pooling
from symbol.ops.row import Attrs
from symbol.torch_backend.registry import lowers


@lowers("Convolution")
def convolution(
    data: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    dilate: tuple[int, ...],
    num_group: int,
    **_: Any,
) -> Tensor:
    """Convolve in the dtype of the data, whatever the dtype of the parameters is."""
    weight = weight.to(data.dtype)
    bias = None if bias is None else bias.to(data.dtype)
    return F.conv2d(data, weight, bias, stride or 1, pad or 0, dilate or 1, num_group)


@lowers("_cast_weight")
def cast_weight(weight: Tensor, *, dtype: str) -> Tensor:
    return weight.to(getattr(torch, dtype))


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softrelu": F.softplus,
    "softsign": F.softsign,
}


@lowers("Activation")
def activation(data: Tensor, *, act_type: str) -> Tensor:
    return _ACTIVATIONS[act_type](data)


def _refuse_pooling(attrs: Attrs) -> bool:
    half_padded = all(2 * pad <= kernel for pad, kernel in zip(attrs["pad"], attrs["kernel"], strict=False))
    return not is_common_pooling(attrs) or not half_padded


@lowers(
    "Pooling",
    refuses=_refuse_pooling,
    only="max and padded average pooling, convention valid or full, padded by half the kernel at most",
)
def pooling(
    data: Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    pool_type: str,
    global_pool: bool,
    pooling_convention: str,
    **_: Any,
) -> Tensor:
    if global_pool:
        return data.amax((2, 3), keepdim=True) if pool_type == "max" else data.mean((2, 3), keepdim=True)
    ceil = pooling_convention == "full"
    if pool_type == "max":
        return F.max_pool2d(data, kernel, stride or 1, pad or 0, ceil_mode=ceil)
    return F.avg_pool2d(data, kernel, stride or 1, pad or 0, ceil_mode=ceil)


@lowers(
    "UpSampling",
    refuses=lambda attrs: attrs["sample_type"] == "bilinear" or attrs["num_args"] > 1,
    only="nearest upsampling of one input",
)
def up_sampling(data: Tensor, *, scale: int, **_: Any) -> Tensor:
    return F.interpolate(data, scale_factor=float(scale), mode="nearest")
