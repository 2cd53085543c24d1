"""Slices, reshapes, transposition, concatenation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symbol.ops.layout import infer_reshape
from symbol.torch_backend.registry import lowers


@lowers("slice_like")
def slice_like(data: Tensor, like: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    for axis in axes or range(min(data.ndim, like.ndim)):
        # where nothing is cut off, the gradient of a slice would still be a copy of the whole, in the default layout
        if data.shape[axis] != like.shape[axis]:
            data = data.narrow(axis, 0, like.shape[axis])
    return data


@lowers("slice_axis")
def slice_axis(data: Tensor, *, axis: int, begin: int, end: int | None) -> Tensor:
    size = data.shape[axis]
    start, stop, _ = slice(begin, end).indices(size)
    return data.narrow(axis, start, stop - start)


@lowers("Reshape", refuses=lambda attrs: not attrs["shape"], only="a shape that is not empty")
def reshape(data: Tensor, *, shape: tuple[int, ...], reverse: bool) -> Tensor:
    return data.reshape(infer_reshape(tuple(data.shape), tuple(shape), reverse))


@lowers("transpose")
def transpose(data: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    return data.permute(tuple(axes) or tuple(reversed(range(data.ndim))))


@lowers("Concat")
def concat(*inputs: Tensor, dim: int, **_: Any) -> Tensor:
    return torch.cat(inputs, dim)
