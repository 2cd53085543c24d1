"""Shape inference, one rule an operator: what a node's known shapes say about the others.

A rule gets the node's full attributes and the shapes of its inputs and outputs (None, or a dimension of 0: unknown)
and returns what it can say of them. `symbol.shape` merges the answers and repeats until nothing changes, so a rule may
speak of its inputs too: a convolution's weight follows from its data, a label from the logits.

N images, A anchors per cell, C classes (or channels), H, W, K anchors of all levels, P cells of all levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from symbol.op_table import Shape

MaybeShape = Shape | None
Shapes = list[MaybeShape]
Rule = Callable[[Mapping[str, Any], Shapes, Shapes], tuple[Shapes, Shapes]]


def _expect_rank(shape: MaybeShape, rank: int, what: str) -> None:
    if shape is not None and len(shape) != rank:
        raise ValueError(f"{what} must have {rank} dimensions, got {shape}")


def _expect_axis(shape: Shape, axis: int) -> None:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"there is no dimension {axis} in {shape}")


def _pair(value: Shape, default: int, what: str) -> Shape:
    if not value:
        return (default, default)
    if len(value) != 2:
        raise ValueError(f"{what} must have 2 numbers, got {value}")
    return value


def _product(dims: Shape) -> int:
    total = 1
    for dim in dims:
        total *= dim  # 0, unknown, stays 0
    return total


def merge(a: MaybeShape, b: MaybeShape) -> MaybeShape:
    """The shape that agrees with both, unknown dimensions filled from either. Raises ValueError where they differ."""
    if a is None or b is None:
        return b if a is None else a
    if len(a) != len(b) or any(x and y and x != y for x, y in zip(a, b, strict=False)):
        raise ValueError(f"shapes {a} and {b} contradict each other")
    return tuple(x or y for x, y in zip(a, b, strict=True))


def _convolution(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data, filters, group = ins[0], attrs["num_filter"], attrs["num_group"]
    _expect_rank(data, 4, "data")
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


def _batch_norm(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data = merge(ins[0], outs[0])
    if attrs.get("axis", 1) != 1:
        raise ValueError(f"axis must be 1, the channels of NCHW; got {attrs['axis']}")
    channel = (data[1],) if data is not None else None
    return [data, *[channel] * 4], [data, channel, channel]


def _same(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    shape = None
    for other in (*ins, *outs):
        shape = merge(shape, other)
    return [shape] * len(ins), [shape]


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


def _pooling(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data = ins[0]
    _expect_rank(data, 4, "data")
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


def _up_sampling(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    _expect_rank(ins[0], 4, "data")
    if ins[0] is None or len(ins) > 1:
        return ins, outs
    if attrs["scale"] < 1:
        raise ValueError(f"scale must be at least 1, got {attrs['scale']}")
    n, c, h, w = ins[0]
    return ins, [(n, c, h * attrs["scale"], w * attrs["scale"])]


def _slice_like(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data, like = ins
    if data is None or like is None:
        return ins, outs
    axes = attrs["axes"] or range(min(len(data), len(like)))
    out = list(data)
    for axis in axes:
        _expect_axis(data, axis)
        _expect_axis(like, axis)
        out[axis] = like[axis]
        if data[axis] and like[axis] > data[axis]:
            raise ValueError(f"cannot cut {data} to {like}: dimension {axis} is too small")
    return ins, [tuple(out)]


def _slice_axis(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data, axis, begin, end = ins[0], attrs["axis"], attrs["begin"], attrs["end"]
    if data is None:
        return ins, outs
    _expect_axis(data, axis)
    if data[axis]:
        size = len(range(data[axis])[begin:end])
        if not size:
            raise ValueError(f"slice [{begin}, {end}) of dimension {axis} of {data} is empty")
    else:
        size = end - begin if end is not None and 0 <= begin < end else 0
    axis %= len(data)
    return ins, [(*data[:axis], size, *data[axis + 1 :])]


def _broadcast(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
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


def reshape(shape: Shape, spec: Shape, reverse: bool = False) -> Shape:
    """MXNet's Reshape: 0 copies a dimension, -1 takes what is left, -2 copies all the rest, -3 multiplies two, -4
    splits one into the two numbers that follow. `reverse` reads both from the right.

    Raises ValueError where it does not fit.
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
    total, known = _product(tuple(source)), _product(tuple(out))
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


def _reshape(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    return ins, outs if ins[0] is None else [reshape(ins[0], attrs["shape"], attrs["reverse"])]


def _transpose(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
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


def _concat(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
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
    return [frame if shape is None else merge(shape, frame) for shape in ins], [
        (*frame[:dim], joined, *frame[dim + 1 :])
    ]


def _focal_loss(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data = merge(ins[0], outs[0])
    _expect_rank(data, 3, "data (N, K, C)")
    return [data, data[:2] if data is not None else None], [data]


def _bbox_norm(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    data = merge(ins[0], outs[0])
    _expect_rank(data, 3, "data (N, 4A, P)")
    return [data, (data[0], data[1] // 4 * data[2]) if data is not None else None], [data]


def _foreground_mean(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    return ins, [merge(ins[0], outs[0])]


def _scalar(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    """A scalar has no shape in MXNet's terms, where 0 axes mean unknown ones."""
    return ins, outs


def _gen_anchor(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    _expect_rank(ins[0], 4, "cls_prob (N, A*C, H, W)")
    if ins[0] is None:
        return ins, outs
    if not attrs["scales"] or not attrs["ratios"]:
        raise ValueError(f"anchors need scales and ratios, got {attrs['scales']} and {attrs['ratios']}")
    count = ins[0][2] * ins[0][3] * len(attrs["scales"]) * len(attrs["ratios"])  # H*W*A
    return ins, [(count, 4)]


def _gen_proposal_retina(attrs: Mapping[str, Any], ins: Shapes, outs: Shapes) -> tuple[Shapes, Shapes]:
    prob, num_anchors, top_n = ins[0], attrs["num_anchors"], attrs["rpn_pre_nms_top_n"]
    _expect_rank(prob, 4, "cls_prob (N, A*C, H, W)")
    if prob is None:
        return ins, outs
    n, channels, h, w = prob
    if num_anchors < 1 or top_n < 1:
        raise ValueError(f"num_anchors {num_anchors} and rpn_pre_nms_top_n {top_n} must be at least 1")
    if channels % num_anchors:
        raise ValueError(f"cls_prob has {channels} channels, no multiple of num_anchors {num_anchors}")
    anchors: Shape = (h * w * num_anchors, 4)
    if attrs["batch_wise_anchor"]:
        anchors = (n, *anchors)
    classes = channels // num_anchors + 1 if attrs["output_one_hot"] else 1
    return [prob, (n, num_anchors * 4, h, w), (n, 3), anchors], [(n, top_n, 4), (n, top_n, classes)]


RULES: Mapping[str, Rule] = {
    "Convolution": _convolution,
    "BatchNorm": _batch_norm,
    "_contrib_SyncBatchNorm": _batch_norm,
    "Activation": _same,
    "Pooling": _pooling,
    "UpSampling": _up_sampling,
    "slice_like": _slice_like,
    "slice_axis": _slice_axis,
    "add_n": _same,
    "elemwise_add": _same,
    "elemwise_sub": _same,
    "elemwise_mul": _same,
    "broadcast_mul": _broadcast,
    "broadcast_div": _broadcast,
    "_mul_scalar": _same,
    "Reshape": _reshape,
    "transpose": _transpose,
    "Concat": _concat,
    "Cast": _same,
    "smooth_l1": _same,
    "MakeLoss": _same,
    "_contrib_FocalLoss": _focal_loss,
    "_contrib_BBoxNorm": _bbox_norm,
    "_contrib_GenAnchor": _gen_anchor,
    "_contrib_GenProposalRetina": _gen_proposal_retina,
    "_foreground_mean": _foreground_mean,
    "_focal_loss_levels": _scalar,
    "_smooth_l1_levels": _scalar,
}
