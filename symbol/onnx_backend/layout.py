"""Slices, reshapes, transposition, concatenation."""

from __future__ import annotations

from typing import Any

from symbol.onnx_backend.registry import lowers
from symbol.onnx_backend.writer import Value, Writer
from symbol.ops import Shape


@lowers("slice_like")
def slice_like(writer: Writer, data: Value, like: Value, *, axes: tuple[int, ...], **_: Any) -> str:
    given = axes or range(min(len(data.shape), len(like.shape)))
    cut = {axis % len(data.shape): like.shape[axis] for axis in given if data.shape[axis] != like.shape[axis]}
    if not cut:
        return data.name
    if min(cut.values()) < 0:
        raise ValueError(f"slice_like '{writer.scope}': cannot cut {data.shape} to a multiple of the batch size")
    return writer.op("Slice", data, writer.ints(*[0] * len(cut)), writer.ints(*cut.values()), writer.ints(*cut))


@lowers("slice_axis")
def slice_axis(writer: Writer, data: Value, *, axis: int, begin: int, end: int | None, **_: Any) -> str:
    stop = end if end is not None else 2**63 - 1  # Slice clips it to the side, and counts a negative one from the end
    return writer.op("Slice", data, writer.ints(begin), writer.ints(stop), writer.ints(axis))


@lowers("Reshape", refuses=lambda attrs: not attrs["shape"], only="a shape that is not empty")
def reshape(writer: Writer, data: Value, *, out_shape: Shape, **_: Any) -> str:
    """Reshape to the inferred shape, one side of which may depend on the batch size."""
    free = sum(side < 0 for side in out_shape)
    if free > 1:
        raise ValueError(f"Reshape '{writer.scope}': the shape {out_shape} has {free} sides with the batch size (-)")
    return writer.op("Reshape", data, writer.ints(*(max(side, -1) for side in out_shape)))


@lowers("transpose")
def transpose(writer: Writer, data: Value, *, axes: tuple[int, ...], **_: Any) -> str:
    return writer.op("Transpose", data, perm=axes or tuple(reversed(range(len(data.shape)))))


@lowers("Concat")
def concat(writer: Writer, *inputs: Value, dim: int, **_: Any) -> str:
    return writer.op("Concat", *inputs, axis=dim)
