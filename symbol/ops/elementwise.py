"""Arithmetic element by element, with and without broadcasting, and Cast."""

from __future__ import annotations

from collections.abc import Iterator

from symbol.attributes import DTYPES, REQUIRED, Attr
from symbol.ops.row import Attrs, Call, Input, Op, Saved, Shapes
from symbol.ops.rules import same_shape


def _broadcast_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    """Align the shapes at their last dimension, as MXNet does: (N, K, C) with (1,) is (N, K, C)."""
    lhs, rhs = ins
    if lhs is None or rhs is None:
        return ins, outs
    rank = max(len(lhs), len(rhs))
    out = []
    for a, b in zip((1,) * (rank - len(lhs)) + lhs, (1,) * (rank - len(rhs)) + rhs, strict=True):
        if a != b and a > 1 and b > 1:
            raise ValueError(f"{lhs} and {rhs} cannot be broadcast")
        out.append(0 if 0 in (a, b) and max(a, b) < 2 else max(a, b))
    return ins, [tuple(out)]


def _product_saves(call: Call) -> Iterator[Saved]:
    left, right = call.needs_grad
    if left:
        yield Input(1)
    if right:
        yield Input(0)


def _quotient_saves(call: Call) -> Iterator[Saved]:
    left, right = call.needs_grad
    if left or right:
        yield Input(1)
    if right:
        yield Input(0)


ROWS = (
    Op("add_n", attrs={"num_args": Attr("int", 1)}, aliases=("ElementWiseSum",), variadic=True, shapes=same_shape),
    Op("elemwise_add", ("lhs", "rhs"), aliases=("_plus", "_add"), shapes=same_shape),
    Op("elemwise_sub", ("lhs", "rhs"), aliases=("_minus", "_sub"), shapes=same_shape, in_loss=True),
    Op("elemwise_mul", ("lhs", "rhs"), aliases=("_mul",), shapes=same_shape, saves=_product_saves, in_loss=True),
    Op("broadcast_mul", ("lhs", "rhs"), shapes=_broadcast_shapes, saves=_product_saves),
    Op("broadcast_div", ("lhs", "rhs"), shapes=_broadcast_shapes, saves=_quotient_saves, in_loss=True),
    Op("_mul_scalar", attrs={"scalar": Attr("float", 1.0), "is_int": Attr("bool", True)}, shapes=same_shape),
    Op(
        "Cast",
        attrs={"dtype": Attr("enum", REQUIRED, DTYPES)},
        aliases=("cast",),
        shapes=same_shape,
        dtype=lambda attrs, dtypes: str(attrs["dtype"]),
        is_view=lambda call: call.dtype == call.input_dtypes[0],
    ),
)
