"""Slices, reshapes, transposition, concatenation."""

from __future__ import annotations

import math

from symbol.attributes import Attr
from symbol.ops.row import Attrs, MaybeShape, Op, Shape, Shapes
from symbol.ops.rules import always_view, expect_axis, merge


def _slice_like_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data, like = ins
    if data is None or like is None:
        return ins, outs
    axes = attrs["axes"] or range(min(len(data), len(like)))
    out = list(data)
    for axis in axes:
        expect_axis(data, axis)
        expect_axis(like, axis)
        out[axis] = like[axis]
        if data[axis] and like[axis] > data[axis]:
            raise ValueError(f"cannot cut {data} to {like}: dimension {axis} is too small")
    return ins, [tuple(out)]


def _slice_axis_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data, axis, begin, end = ins[0], attrs["axis"], attrs["begin"], attrs["end"]
    if data is None:
        return ins, outs
    expect_axis(data, axis)
    if data[axis]:
        size = len(range(data[axis])[begin:end])
        if not size:
            raise ValueError(f"slice [{begin}, {end}) of dimension {axis} of {data} is empty")
    else:
        size = end - begin if end is not None and 0 <= begin < end else 0
    axis %= len(data)
    return ins, [(*data[:axis], size, *data[axis + 1 :])]


def infer_reshape(shape: Shape, spec: Shape, reverse: bool = False) -> Shape:
    """Return the shape that MXNet's Reshape gives.

    In `spec` 0 copies a dimension, -1 takes what is left, -2 copies all the rest, -3 multiplies two, -4 splits one into
    the two numbers that follow. `reverse` reads both from the right. Raises ValueError where it does not fit.
    """
    source, target = list(shape), list(spec)
    if reverse:
        if -4 in target:
            raise ValueError("the code -4 cannot be read from the right (reverse)")
        source, target = source[::-1], target[::-1]
    out: list[int] = []
    position, index, rest = 0, 0, None
    try:
        while index < len(target):
            code = target[index]
            if code == 0:
                out.append(source[position])
                position += 1
            elif code == -1:
                if rest is not None:
                    raise ValueError("more than one dimension is left open")
                rest = len(out)
                out.append(1)
                position += 1
            elif code == -2:
                out.extend(source[position:])
                position = len(source)
            elif code == -3:
                out.append(source[position] * source[position + 1])
                position += 2
            elif code == -4:
                out.extend(_split(source[position], *target[index + 1 : index + 3]))
                position, index = position + 1, index + 2
            elif code > 0:
                out.append(code)
                position += 1
            else:
                raise ValueError(f"unknown code {code}")
            index += 1
    except (IndexError, TypeError):
        raise ValueError(f"{spec} asks for more dimensions than {shape} has") from None
    total, known = math.prod(source), math.prod(out)  # 0, unknown, stays 0
    if rest is not None:
        if known and total % known:
            raise ValueError(f"{shape} cannot be reshaped to {spec}: {total} elements, {known} per unit")
        out[rest] = total // known if known else 0
    elif total and known and total != known:
        raise ValueError(f"{shape} cannot be reshaped to {spec}: {total} elements, {known} expected")
    return tuple(out[::-1] if reverse else out)


def _split(size: int, left: int, right: int) -> tuple[int, int]:
    if left == right == -1 or min(left, right) < -1 or 0 in (left, right):
        raise ValueError(f"-4 needs two sizes, one of which may be -1; got {left} and {right}")
    left = size // right if left == -1 else left
    right = size // left if right == -1 else right
    if size and left * right != size:
        raise ValueError(f"a dimension of {size} cannot be split into {left} x {right}")
    return left, right


def _reshape_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    return ins, outs if ins[0] is None else [infer_reshape(ins[0], attrs["shape"], attrs["reverse"])]


def _transpose_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    known = ins[0] if ins[0] is not None else outs[0]
    if known is None:
        return ins, outs
    axes = attrs["axes"] or tuple(reversed(range(len(known))))
    if sorted(axes) != list(range(len(known))):
        raise ValueError(f"axes {axes} are no permutation of the {len(known)} dimensions of {known}")
    if ins[0] is not None:
        return ins, [tuple(ins[0][axis] for axis in axes)]
    back = [0] * len(known)
    for position, axis in enumerate(axes):
        back[axis] = known[position]
    return [tuple(back)], outs


def _concat_shapes(attrs: Attrs, ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    known = [shape for shape in ins if shape is not None]
    if not known:
        return ins, outs
    rank = len(known[0])
    if any(len(shape) != rank for shape in known) or not -rank <= attrs["dim"] < rank:
        raise ValueError(f"inputs of ranks {[len(shape) for shape in known]} cannot be joined along {attrs['dim']}")
    dim = attrs["dim"] % rank
    frame: MaybeShape = None
    for shape in known:
        frame = merge(frame, (*shape[:dim], 0, *shape[dim + 1 :]))
    assert frame is not None
    complete = len(known) == len(ins) and all(shape[dim] for shape in known)
    joined = sum(shape[dim] for shape in known) if complete else 0
    inputs = [frame if shape is None else merge(shape, frame) for shape in ins]
    return inputs, [(*frame[:dim], joined, *frame[dim + 1 :])]


ROWS = (
    Op(
        "slice_like",
        ("data", "shape_like"),
        {"axes": Attr("ints", ())},
        shapes=_slice_like_shapes,
        is_view=always_view,
    ),
    Op(
        "slice_axis",
        attrs={"axis": Attr("int"), "begin": Attr("int"), "end": Attr("int", None, always_written=True)},
        shapes=_slice_axis_shapes,
        is_view=always_view,
        in_loss=True,
    ),
    Op(
        "Reshape",
        attrs={"shape": Attr("ints"), "reverse": Attr("bool", False)},
        aliases=("reshape",),
        shapes=_reshape_shapes,
        is_view=lambda call: call.producers[0] != "transpose",  # no strides fit a transposed tensor: it is copied
        in_loss=True,
    ),
    Op("transpose", attrs={"axes": Attr("ints", ())}, shapes=_transpose_shapes, is_view=always_view, in_loss=True),
    Op(
        "Concat",
        attrs={"num_args": Attr("int", 1), "dim": Attr("int", 1)},
        aliases=("concat",),
        variadic=True,
        shapes=_concat_shapes,
        in_loss=True,
    ),
)
