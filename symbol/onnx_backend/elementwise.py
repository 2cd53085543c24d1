"""Arithmetic element by element, and Cast. Shape inference has refused unequal shapes where MXNet does."""

from __future__ import annotations

from typing import Any

from symbol.onnx_backend.registry import lowers
from symbol.onnx_backend.writer import Value, Writer, tensor_type

_BINARY = {
    "elemwise_add": "Add",
    "elemwise_sub": "Sub",
    "elemwise_mul": "Mul",
    "broadcast_mul": "Mul",
    "broadcast_div": "Div",
}


def _register(op: str, onnx_op: str) -> None:
    @lowers(op)
    def binary(writer: Writer, lhs: Value, rhs: Value, **_: Any) -> str:
        return writer.op(onnx_op, lhs, rhs)


for _op, _onnx_op in _BINARY.items():
    _register(_op, _onnx_op)


@lowers("add_n")
def add_n(writer: Writer, *terms: Value, **_: Any) -> str:
    """Add the terms in their order: ONNX's Sum leaves the order open, and some engines have it for two terms only."""
    total = terms[0].name
    for term in terms[1:]:
        total = writer.op("Add", total, term)
    return total


@lowers("_mul_scalar")
def mul_scalar(writer: Writer, data: Value, *, scalar: float, **_: Any) -> str:
    return writer.op("Mul", data, writer.constant(scalar))


@lowers("Cast")
def cast(writer: Writer, data: Value, *, dtype: str, **_: Any) -> str:
    return writer.op("Cast", data, to=tensor_type(dtype))
