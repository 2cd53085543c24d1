"""Rules that several rows share: shapes, dtypes and saved tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from symbol.ops.row import Attrs, Call, Extra, MaybeShape, Saved, Shape, Shapes


def merge(a: MaybeShape, b: MaybeShape) -> MaybeShape:
    """Return the shape that agrees with both, unknown dimensions filled from either.

    Raises ValueError where they differ.
    """
    if a is None or b is None:
        return b if a is None else a
    if len(a) != len(b) or any(x and y and x != y for x, y in zip(a, b, strict=False)):
        raise ValueError(f"shapes {a} and {b} contradict each other")
    return tuple(x or y for x, y in zip(a, b, strict=True))


def same_shape(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    """All inputs and the output have one shape."""
    shape = None
    for other in (*ins, *outs):
        shape = merge(shape, other)
    return [shape] * len(ins), [shape]


def expect_rank(shape: MaybeShape, rank: int, label: str) -> None:
    """Raise ValueError for a known shape of another rank."""
    if shape is not None and len(shape) != rank:
        raise ValueError(f"{label} must have {rank} dimensions, got {shape}")


def expect_axis(shape: Shape, axis: int) -> None:
    """Raise ValueError for an axis that the shape does not have."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"there is no dimension {axis} in {shape}")


def float32(attrs: Attrs, dtypes: Sequence[str]) -> str:
    """The output is float32, whatever the inputs are."""
    return "float32"


def always_view(call: Call) -> bool:
    """The output shares the storage of the first input."""
    return True


def save_gradients(call: Call) -> Iterator[Saved]:
    """Save the gradient of each input, which the forward pass makes; or the input itself, which is as large."""
    for index, needs_grad in enumerate(call.needs_grad):
        if needs_grad:
            yield Extra(f"gradient{index}", call.input_bytes(index))
