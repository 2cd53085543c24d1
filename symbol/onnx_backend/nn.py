"""Convolution, normalization by moving statistics, activation, pooling, upsampling. N images, C channels, H, W."""

from __future__ import annotations

from typing import Any

import numpy as np

from symbol.onnx_backend.registry import lowers
from symbol.onnx_backend.writer import Value, Writer
from symbol.ops.nn import is_common_pooling
from symbol.ops.row import Attrs


@lowers("Convolution")
def convolution(
    writer: Writer,
    data: Value,
    weight: Value,
    *bias: Value,
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    dilate: tuple[int, ...],
    num_group: int,
    **_: Any,
) -> str:
    geometry: dict[str, Any] = {"strides": stride or (1, 1), "pads": (pad or (0, 0)) * 2, "dilations": dilate or (1, 1)}
    return writer.op("Conv", data, weight, *bias, kernel_shape=weight.shape[2:], group=num_group, **geometry)


def _register_batch_norm(op: str) -> None:
    @lowers(op, refuses=lambda attrs: attrs["output_mean_var"], only="without output_mean_var")
    def batch_norm(
        writer: Writer,
        data: Value,
        gamma: Value,
        beta: Value,
        moving_mean: Value,
        moving_var: Value,
        *,
        eps: float,
        fix_gamma: bool,
        **_: Any,
    ) -> str:
        """Normalize by the moving statistics: a normalization that follows no convolution is not folded."""
        scale = writer.constant(np.ones(gamma.shape)) if fix_gamma else gamma
        return writer.op("BatchNormalization", data, scale, beta, moving_mean, moving_var, epsilon=eps)


for _op in ("BatchNorm", "_contrib_SyncBatchNorm"):
    _register_batch_norm(_op)

_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "softrelu": "Softplus", "softsign": "Softsign"}


@lowers("Activation")
def activation(writer: Writer, data: Value, *, act_type: str, **_: Any) -> str:
    return writer.op(_ACTIVATIONS[act_type], data)


def _refuse_pooling(attrs: Attrs) -> bool:
    return not is_common_pooling(attrs) or (
        attrs["pool_type"] == "avg" and attrs["pooling_convention"] == "full" and not attrs["global_pool"]
    )


@lowers(
    "Pooling",
    refuses=_refuse_pooling,
    only="max pooling of convention valid or full, and padded average pooling of convention valid",
)
def pooling(
    writer: Writer,
    data: Value,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    pool_type: str,
    global_pool: bool,
    pooling_convention: str,
    **_: Any,
) -> str:
    if global_pool:
        return writer.op("GlobalMaxPool" if pool_type == "max" else "GlobalAveragePool", data)
    geometry: dict[str, Any] = {"kernel_shape": kernel, "strides": stride or (1, 1), "pads": (pad or (0, 0)) * 2}
    if pool_type == "max":
        return writer.op("MaxPool", data, **geometry, ceil_mode=int(pooling_convention == "full"))
    return writer.op("AveragePool", data, **geometry, count_include_pad=1)


@lowers(
    "UpSampling",
    refuses=lambda attrs: attrs["sample_type"] == "bilinear" or attrs["num_args"] > 1,
    only="nearest upsampling of one input",
)
def up_sampling(writer: Writer, data: Value, *, scale: int, **_: Any) -> str:
    scales = writer.constant([1, 1, scale, scale])
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return writer.op("Resize", data, "", scales, **how)
