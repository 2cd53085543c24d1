"""Losses and what normalizes them. N images, K anchors of all levels, C classes, A anchors per cell, P cells of all
levels.

The last three are not MXNet's: passes put them in before a graph is lowered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from symbol.attributes import Attr
from symbol.ops.row import Attrs, Call, Extra, Input, Op, Saved, Shapes
from symbol.ops.rules import always_view, expect_rank, float32, merge, same_shape, save_gradients


def _smooth_l1_saves(call: Call) -> Iterator[Saved]:
    yield Input(0)
    yield Extra("near", call.input_bytes(0))
    yield Extra("scaled", call.input_bytes(0))
    yield Extra("is_near", math.prod(call.inputs[0]))


def _focal_loss_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data = merge(ins[0], outs[0])
    expect_rank(data, 3, "data (N, K, C)")
    return [data, data[:2] if data is not None else None], [data]


def _bbox_norm_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data = merge(ins[0], outs[0])
    expect_rank(data, 3, "data (N, 4A, P)")
    return [data, (data[0], data[1] // 4 * data[2]) if data is not None else None], [data]


def _foreground_mean_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    return ins, [merge(ins[0], outs[0])]


def _scalar_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    """Say nothing: in MXNet's terms a scalar has no shape, as 0 dimensions mean unknown ones."""
    return ins, outs


_NORMALIZATION = ("null", "batch", "valid")
_FOCAL_LOSS = {
    "alpha": Attr("float", 0.25),
    "gamma": Attr("float", 2.0),
    "grad_scale": Attr("float", 1.0),
    "normalization": Attr("enum", "null", _NORMALIZATION),
}

ROWS = (
    Op(
        "smooth_l1",
        attrs={"scalar": Attr("float", 1.0), "is_int": Attr("bool", True)},
        shapes=same_shape,
        saves=_smooth_l1_saves,
        recompute=False,
        in_loss=True,
    ),
    Op(
        "MakeLoss",
        attrs={
            "grad_scale": Attr("float", 1.0),
            "valid_thresh": Attr("float", 0.0),
            "normalization": Attr("enum", "null", _NORMALIZATION),
        },
        shapes=same_shape,
        recompute=False,
        in_loss=True,
    ),
    Op(
        "_contrib_FocalLoss",
        ("data", "label"),
        {**_FOCAL_LOSS, "out_grad": Attr("bool", False), "workspace": Attr("int", 256)},
        shapes=_focal_loss_shapes,
        saves=save_gradients,
        recompute=False,
        in_loss=True,
    ),
    Op(
        "_contrib_BBoxNorm",
        ("data", "label"),
        {"normalization": Attr("enum", "valid", _NORMALIZATION)},
        shapes=_bbox_norm_shapes,
        is_view=always_view,
        recompute=False,
        in_loss=True,
    ),
    # `passes.hoist_bbox_norm` puts it behind a MakeLoss
    Op("_foreground_mean", ("data", "label"), shapes=_foreground_mean_shapes, recompute=False, in_loss=True),
    # `passes.fuse_losses` puts these in; their inputs are labels or targets and weights, then the map of every level
    Op(
        "_focal_loss_levels",
        attrs={"num_args": Attr("int", 1), "num_class": Attr("int"), **_FOCAL_LOSS},
        variadic=True,
        shapes=_scalar_shapes,
        dtype=float32,
        saves=save_gradients,
        recompute=False,
        in_loss=True,
    ),
    Op(
        "_smooth_l1_levels",
        attrs={"num_args": Attr("int", 1), "scalar": Attr("float", 1.0)},
        variadic=True,
        shapes=_scalar_shapes,
        dtype=float32,
        saves=save_gradients,
        recompute=False,
        in_loss=True,
    ),
)
