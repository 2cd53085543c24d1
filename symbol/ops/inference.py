"""Operators of test graphs alone, which `passes.fuse_inference` puts in. N images, C channels, H, W."""

from __future__ import annotations

from dataclasses import replace

from symbol.attributes import Attr
from symbol.ops.nn import ROWS as NN_ROWS
from symbol.ops.row import Attrs, Op, Shapes
from symbol.ops.rules import merge, same_shape

_CONVOLUTION = next(row for row in NN_ROWS if row.name == "Convolution")


def _convolution_add_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data, addend, *parameters = ins
    (data, *parameters), (out,) = _CONVOLUTION.shapes(attrs, [data, *parameters], outs)
    out = merge(out, addend)
    return [data, out, *parameters], [out]


ROWS = (
    replace(_CONVOLUTION, name="_convolution_relu", recompute=False),
    replace(
        _CONVOLUTION,
        name="_convolution_add",
        inputs=("data", "addend", "weight", "bias"),
        attrs={**_CONVOLUTION.attrs, "relu": Attr("bool", False)},
        shapes=_convolution_add_shapes,
        multiply_adds=lambda inputs, output: _CONVOLUTION.multiply_adds([inputs[0], inputs[2]], output),
        recompute=False,
    ),
    Op("_add_relu", attrs={"num_args": Attr("int", 1)}, variadic=True, shapes=same_shape, recompute=False),
)
