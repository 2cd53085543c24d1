"""Arithmetic element by element, and Cast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symbol.torch_backend.registry import lowers


def require_one_shape(lhs: Tensor, rhs: Tensor) -> None:
    """Raise ValueError for shapes that torch would broadcast and MXNet's elementwise operators refuse."""
    if lhs.shape != rhs.shape:
        raise ValueError(
            f"expected two inputs of one shape, got {tuple(lhs.shape)} and {tuple(rhs.shape)}: "
            "use broadcast_mul or broadcast_div, or Reshape one of them"
        )


@lowers("elemwise_add")
def elemwise_add(lhs: Tensor, rhs: Tensor) -> Tensor:
    require_one_shape(lhs, rhs)
    return lhs + rhs


@lowers("elemwise_sub")
def elemwise_sub(lhs: Tensor, rhs: Tensor) -> Tensor:
    require_one_shape(lhs, rhs)
    return lhs - rhs


@lowers("elemwise_mul")
def elemwise_mul(lhs: Tensor, rhs: Tensor) -> Tensor:
    require_one_shape(lhs, rhs)
    return lhs * rhs


@lowers("add_n")
def add_n(*terms: Tensor, **_: Any) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = elemwise_add(total, term)
    return total


@lowers("broadcast_mul")
def broadcast_mul(lhs: Tensor, rhs: Tensor) -> Tensor:
    return lhs * rhs


@lowers("broadcast_div")
def broadcast_div(lhs: Tensor, rhs: Tensor) -> Tensor:
    return lhs / rhs


@lowers("_mul_scalar")
def mul_scalar(data: Tensor, *, scalar: float, **_: Any) -> Tensor:
    return data * scalar


@lowers("Cast")
def cast(data: Tensor, *, dtype: str) -> Tensor:
    return data.to(getattr(torch, dtype))
