"""Layers: convolution, normalization, activation, pooling, upsampling. N images, C channels, H, W."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from symbol.attributes import DTYPES, REQUIRED, Attr
from symbol.ops.row import Attrs, Call, Extra, Input, Op, Output, Saved, Shape, Shapes, itemsize
from symbol.ops.rules import expect_rank, merge, same_shape


def _of_data(attrs: Attrs, dtypes: Sequence[str]) -> str:
    """A layer computes in the dtype of its data; its parameters are stored in float32."""
    return dtypes[0]


def _pair(value: Shape, default: int, label: str) -> Shape:
    if not value:
        return (default, default)
    if len(value) != 2:
        raise ValueError(f"{label} must have 2 numbers, got {value}")
    return value


def _convolution_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data, filters, group = ins[0], attrs["num_filter"], attrs["num_group"]
    expect_rank(data, 4, "data")
    kernel = _pair(attrs["kernel"], 1, "kernel")
    stride = _pair(attrs["stride"], 1, "stride")
    dilate = _pair(attrs["dilate"], 1, "dilate")
    pad = _pair(attrs["pad"], 0, "pad")
    if filters < 1 or group < 1 or filters % group or min(kernel + stride + dilate) < 1 or min(pad) < 0:
        raise ValueError(f"num_filter {filters}, num_group {group}, kernel {kernel}, stride {stride} do not fit")
    weight, out = None, None
    if data is not None:
        if data[1] % group:
            raise ValueError(f"{data[1]} channels cannot be split into num_group {group}")
        weight = (filters, data[1] // group, *kernel)
        spans = [d * (k - 1) + 1 for d, k in zip(dilate, kernel, strict=True)]
        sides = []
        for side, span, s, p in zip(data[2:], spans, stride, pad, strict=True):
            if side and side + 2 * p < span:
                raise ValueError(f"kernel {kernel} does not fit into data {data} padded by {pad}")
            sides.append((side + 2 * p - span) // s + 1 if side else 0)
        out = (data[0], filters, *sides)
    bias: Shapes = [] if attrs["no_bias"] else [(filters,)]
    return [data, weight, *bias], [out]


def _convolution_saves(call: Call) -> Iterator[Saved]:
    yield Input(0)
    yield Input(1)
    if call.dtype != call.input_dtypes[1]:
        yield Extra("weight", math.prod(call.inputs[1]) * itemsize(call.dtype))


def _convolution_multiply_adds(inputs: Sequence[Shape], output: Shape) -> int:
    return math.prod(output) * math.prod(inputs[1][1:])


def _batch_norm_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data = merge(ins[0], outs[0])
    if attrs.get("axis", 1) != 1:
        raise ValueError(f"axis must be 1, the channels of NCHW; got {attrs['axis']}")
    channel = (data[1],) if data is not None else None
    return [data, *[channel] * 4], [data, channel, channel]


def _fused_batch_norm_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    residual = [] if attrs["no_residual"] else [ins[-3]]
    data = ins[0]
    for other in [outs[0], *residual]:
        data = merge(data, other)
    channel = (data[1],) if data is not None else None
    bias = [] if attrs["no_bias"] else [channel]
    return [data, channel, channel, *bias, *[data for _ in residual], channel, channel], [data, channel, channel]


def _batch_norm_saves(call: Call) -> Iterator[Saved]:
    yield Input(0)
    if not call.attrs["use_global_stats"]:
        yield Extra("statistics", 8 * math.prod(call.inputs[1]))  # mean and deviation (C,), float32


def _fused_batch_norm_saves(call: Call) -> Iterator[Saved]:
    yield from _batch_norm_saves(call)
    if call.attrs["relu"]:
        yield Output(0)


def _activation_saves(call: Call) -> Iterator[Saved]:
    yield Input(0) if call.attrs["act_type"] in ("softrelu", "softsign") else Output(0)
    if call.attrs["act_type"] == "softsign":
        yield Extra("divisor", call.input_bytes(0))


def _pooling_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data = ins[0]
    expect_rank(data, 4, "data")
    if data is None:
        return ins, outs
    if attrs["global_pool"]:
        return ins, [(*data[:2], 1, 1)]
    kernel = _pair(attrs["kernel"], 0, "kernel")
    stride, pad = _pair(attrs["stride"], 1, "stride"), _pair(attrs["pad"], 0, "pad")
    if min(kernel) < 1 or min(stride) < 1 or min(pad) < 0 or any(p >= k for p, k in zip(pad, kernel, strict=True)):
        raise ValueError(f"kernel {kernel}, stride {stride} and pad {pad} do not fit")
    sides = zip(data[2:], kernel, stride, pad, strict=True)
    return ins, [(*data[:2], *(_pooled_side(*side, attrs["pooling_convention"]) for side in sides))]


def _pooled_side(side: int, kernel: int, stride: int, pad: int, convention: str) -> int:
    if not side:
        return 0
    if convention == "same":
        return -(-side // stride)
    span = side + 2 * pad - kernel
    if span < 0:
        raise ValueError(f"kernel {kernel} does not fit into side {side} padded by {pad}")
    out = (span // stride if convention == "valid" else -(-span // stride)) + 1
    if (out - 1) * stride >= side + pad:
        raise ValueError(
            f"kernel {kernel}, stride {stride} and pad {pad}: the last window of side {side} is padding only"
        )
    return out


def _pooling_saves(call: Call) -> Iterator[Saved]:
    is_max, is_global = call.attrs["pool_type"] == "max", call.attrs["global_pool"]
    if is_max or not is_global:
        yield Input(0)
    if is_max:
        yield Output(0) if is_global else Extra("index", 8 * math.prod(call.output))


def _up_sampling_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    expect_rank(ins[0], 4, "data")
    if ins[0] is None or len(ins) > 1:
        return ins, outs
    if attrs["scale"] < 1:
        raise ValueError(f"scale must be at least 1, got {attrs['scale']}")
    n, c, h, w = ins[0]
    return ins, [(n, c, h * attrs["scale"], w * attrs["scale"])]


_BATCH_NORM_ATTRS = {
    "eps": Attr("float", 1e-3),
    "momentum": Attr("float", 0.9),
    "fix_gamma": Attr("bool", True),
    "use_global_stats": Attr("bool", False),
    "output_mean_var": Attr("bool", False),
}
_BATCH_NORM: dict[str, Any] = {
    "parameters": ("gamma", "beta", "moving_mean", "moving_var"),
    "auxiliary": ("moving_mean", "moving_var"),
    "outputs": ("output", "mean", "var"),
    "visible": lambda attrs: 3 if attrs["output_mean_var"] else 1,
    "shapes": _batch_norm_shapes,
    "dtype": _of_data,
    "saves": _batch_norm_saves,
}


def is_common_pooling(attrs: Attrs) -> bool:
    """Return whether pooling is one that every back end has: max or padded average, of convention valid or full."""
    plain = attrs["pool_type"] in ("max", "avg") and attrs["pooling_convention"] in ("valid", "full")
    return plain and attrs["count_include_pad"] != "False"


ROWS = (
    Op(
        "Convolution",
        ("data", "weight", "bias"),
        {
            "kernel": Attr("ints"),
            "stride": Attr("ints", ()),
            "dilate": Attr("ints", ()),
            "pad": Attr("ints", ()),
            "num_filter": Attr("int"),
            "num_group": Attr("int", 1),
            "workspace": Attr("int", 1024),
            "no_bias": Attr("bool", False),
            "cudnn_tune": Attr("enum", None, ("fastest", "limited_workspace", "off")),
            "layout": Attr("enum", None, ("NCHW",)),
            "cudnn_off": Attr("bool", False),
        },
        parameters=("weight", "bias"),
        shapes=_convolution_shapes,
        dtype=_of_data,
        saves=_convolution_saves,
        multiply_adds=_convolution_multiply_adds,
    ),
    Op(
        "BatchNorm",
        ("data", "gamma", "beta", "moving_mean", "moving_var"),
        {
            **_BATCH_NORM_ATTRS,
            "axis": Attr("int", 1),
            "min_calib_range": Attr("float", None),
            "max_calib_range": Attr("float", None),
            "cudnn_off": Attr("bool", False),
        },
        **_BATCH_NORM,
    ),
    Op(
        "_contrib_SyncBatchNorm",
        ("data", "gamma", "beta", "moving_mean", "moving_var"),
        {**_BATCH_NORM_ATTRS, "ndev": Attr("int", 1), "key": Attr("string")},
        **_BATCH_NORM,
    ),
    # `passes.fuse_batch_norm` puts it in: relu(batch_norm(data) + residual), with or without the ReLU and the residual.
    # `bias` was that of the convolution before: it moves the moving mean, and nothing else.
    Op(
        "_batch_norm",
        ("data", "gamma", "beta", "bias", "residual", "moving_mean", "moving_var"),
        {
            **{key: attr for key, attr in _BATCH_NORM_ATTRS.items() if key != "output_mean_var"},
            "sync": Attr("bool", False),
            "relu": Attr("bool", False),
            "no_bias": Attr("bool", True),
            "no_residual": Attr("bool", True),
        },
        parameters=("gamma", "beta", "bias", "moving_mean", "moving_var"),
        auxiliary=("moving_mean", "moving_var"),
        outputs=("output", "mean", "var"),
        shapes=_fused_batch_norm_shapes,
        dtype=_of_data,
        saves=_fused_batch_norm_saves,
    ),
    # `passes.cast_weights` puts it in
    Op(
        "_cast_weight",
        ("weight",),
        {"dtype": Attr("enum", REQUIRED, DTYPES)},
        parameters=("weight",),
        shapes=same_shape,
        dtype=lambda attrs, dtypes: str(attrs["dtype"]),
    ),
    Op(
        "Activation",
        attrs={"act_type": Attr("enum", REQUIRED, ("relu", "sigmoid", "tanh", "softrelu", "softsign"))},
        shapes=same_shape,
        saves=_activation_saves,
    ),
    Op(
        "Pooling",
        attrs={
            "kernel": Attr("ints", ()),
            "pool_type": Attr("enum", "max", ("max", "avg", "sum", "lp")),
            "global_pool": Attr("bool", False),
            "pooling_convention": Attr("enum", "valid", ("valid", "full", "same")),
            "stride": Attr("ints", ()),
            "pad": Attr("ints", ()),
            "p_value": Attr("int", None),
            "count_include_pad": Attr("enum", None, ("True", "False")),
            "layout": Attr("enum", None, ("NCHW",)),
            "cudnn_off": Attr("bool", False),
        },
        shapes=_pooling_shapes,
        saves=_pooling_saves,
    ),
    Op(
        "UpSampling",
        attrs={
            "scale": Attr("int"),
            "sample_type": Attr("enum", REQUIRED, ("nearest", "bilinear")),
            "num_args": Attr("int", 1),
            "num_filter": Attr("int", 0),
            "multi_input_mode": Attr("enum", "concat", ("concat", "sum")),
            "workspace": Attr("int", 512),
        },
        variadic=True,
        shapes=_up_sampling_shapes,
    ),
)
