import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import symbol as S
from symbol import lower, var
from symbol.ops.layout import infer_reshape
from symbol.ops.rules import merge


@pytest.mark.parametrize(
    "shape, spec, reverse, expected",
    [
        ((2, 3, 4), (4, 6), False, (4, 6)),
        ((2, 3, 4), (4, 0, 2), False, (4, 3, 2)),  # 0 copies the dimension at its own place
        ((2, 3, 4), (2, 0, 0), False, (2, 3, 4)),
        ((2, 3, 4), (6, 1, -1), False, (6, 1, 4)),  # 24 / 6
        ((2, 3, 4), (3, -1, 8), False, (3, 1, 8)),
        ((2, 3, 4), (-1,), False, (24,)),
        ((2, 3, 4), (-2,), False, (2, 3, 4)),
        ((2, 3, 4), (2, -2), False, (2, 3, 4)),
        ((2, 3, 4), (-2, 1, 1), False, (2, 3, 4, 1, 1)),
        ((2, 3, 4), (-3, 4), False, (6, 4)),  # 2 * 3
        ((2, 3, 4, 5), (-3, -3), False, (6, 20)),
        ((2, 3, 4), (0, -3), False, (2, 12)),
        ((2, 3, 4), (-3, -2), False, (6, 4)),
        ((2, 3, 4), (-4, 1, 2, -2), False, (1, 2, 3, 4)),  # 2 = 1 * 2
        ((2, 3, 4), (2, -4, -1, 3, -2), False, (2, 1, 3, 4)),
        ((2, 12), (0, -4, 3, -1), False, (2, 3, 4)),
        ((10, 5, 4), (-1, 0), False, (40, 5)),
        ((10, 5, 4), (-1, 0), True, (50, 4)),  # from the right: 4 is copied, 50 is left
        ((2, 3, 4), (-1, -3), True, (2, 12)),  # from the right: 3 * 4, then what is left
        ((2, 3, 4), (-2,), True, (2, 3, 4)),
        # the two reshapes of the head: (N, A*C, H, W) -> (N, A, C, H*W), and (N, A, H*W, C) -> (N, A*H*W, C)
        ((2, 36, 5, 7), (0, 9, 4, -1), False, (2, 9, 4, 35)),
        ((2, 9, 35, 4), (0, -3, 0), False, (2, 315, 4)),
        # unknown dimensions stay unknown
        ((0, 36, 0, 0), (0, 9, 4, -1), False, (0, 9, 4, 0)),
        ((0, 9, 0, 4), (0, -3, 0), False, (0, 0, 4)),
        ((0, 9), (-4, 2, -1, 0), False, (2, 0, 9)),
    ],
)
def test_reshape_codes(shape, spec, reverse, expected):
    assert infer_reshape(shape, spec, reverse) == expected


@pytest.mark.parametrize(
    "shape, spec, reverse, message",
    [
        ((2, 3, 4), (5, 5), False, "24 elements, 25 expected"),
        ((2, 3, 4), (5, -1), False, "24 elements, 5 per unit"),
        ((2, 3, 4), (-1, -1), False, "more than one dimension is left open"),
        ((2, 3), (0, 0, 0), False, "asks for more dimensions"),
        ((2, 3), (0, -3), False, "asks for more dimensions"),
        ((6,), (-4, 2), False, "asks for more dimensions"),
        ((6,), (-4, 4, -1), False, "a dimension of 6 cannot be split into 4 x 1"),
        ((6,), (-4, 2, 2), False, "a dimension of 6 cannot be split into 2 x 2"),
        ((6,), (-4, -1, -1), False, "-4 needs two sizes"),
        ((6,), (-4, -1, 0), False, "-4 needs two sizes"),
        ((6,), (-4, -3, -2), False, "-4 needs two sizes"),
        ((6,), (-4, 2, 3), True, "-4 cannot be read from the right"),
        ((6,), (-5,), False, "unknown code -5"),
        ((6,), (), False, "6 elements, 1 expected"),
    ],
)
def test_reshapes_that_do_not_fit(shape, spec, reverse, message):
    with pytest.raises(ValueError, match=message):
        infer_reshape(shape, spec, reverse)


@given(
    st.lists(st.integers(1, 6), max_size=5).map(tuple),
    st.lists(st.integers(-4, 6), max_size=6).map(tuple),
    st.booleans(),
)
@settings(deadline=None)
def test_a_reshape_keeps_every_element_or_is_refused(shape, spec, reverse):
    try:
        out = infer_reshape(shape, spec, reverse)
    except ValueError:
        return
    assert math.prod(out) == math.prod(shape)
    assert min(out, default=1) >= 1


def test_merging():
    assert merge(None, None) is None
    assert merge(None, (1, 0)) == merge((1, 0), None) == (1, 0)
    assert merge((1, 0, 0), (0, 2, 0)) == (1, 2, 0)
    with pytest.raises(ValueError, match="contradict"):
        merge((1, 2), (1, 3))
    with pytest.raises(ValueError, match="contradict"):
        merge((1, 2), (1, 2, 3))


def inferred(op, *shapes, **attrs):
    inputs = [var(f"x{i}") for i in range(len(shapes))]
    graph = S.create(op, *inputs, name="node", **attrs)
    return graph.infer_shape(**{f"x{i}": shape for i, shape in enumerate(shapes)})[1]


@pytest.mark.parametrize(
    "op, shapes, attrs, expected",
    [
        # (11 + 2 * 3 - (2 * (3 - 1) + 1)) // 2 + 1 = 7; (8 + 2 * 0 - 3) // 1 + 1 = 6
        (
            "Convolution",
            [(1, 4, 11, 8)],
            {"num_filter": 6, "kernel": (3, 3), "dilate": (2, 1), "pad": (3, 0), "stride": (2, 1)},
            (1, 6, 7, 6),
        ),
        ("Convolution", [(1, 4, 0, 8)], {"num_filter": 6, "kernel": (3, 3)}, None),  # the height stays open
        ("Pooling", [(1, 4, 7, 8)], {"kernel": (3, 3), "stride": (2, 2), "pad": (1, 1)}, (1, 4, 4, 4)),
        (
            "Pooling",
            [(1, 4, 7, 8)],
            {"kernel": (3, 3), "stride": (2, 2), "pad": (1, 1), "pooling_convention": "full"},
            (1, 4, 4, 5),
        ),
        ("Pooling", [(1, 4, 7, 8)], {"kernel": (3, 3), "stride": (2, 3), "pooling_convention": "same"}, (1, 4, 4, 3)),
        ("Pooling", [(1, 4, 7, 8)], {"global_pool": True}, (1, 4, 1, 1)),
        ("UpSampling", [(1, 4, 7, 8)], {"scale": 4, "sample_type": "nearest"}, (1, 4, 28, 32)),
        ("slice_like", [(1, 4, 7, 8), (1, 2, 5, 8)], {}, (1, 2, 5, 8)),
        ("slice_like", [(1, 4, 7, 8), (9, 9, 5, 8)], {"axes": (2, -1)}, (1, 4, 5, 8)),
        ("slice_axis", [(4, 7)], {"axis": 1, "begin": 2, "end": 5}, (4, 3)),
        ("slice_axis", [(4, 7)], {"axis": -1, "begin": -3}, (4, 3)),
        ("slice_axis", [(0, 7)], {"axis": 0, "begin": 0, "end": 1}, (1, 7)),
        ("broadcast_mul", [(2, 3, 4, 4), (2, 3, 1, 1)], {}, (2, 3, 4, 4)),
        ("broadcast_div", [(2, 1, 4), (1, 3, 1)], {}, (2, 3, 4)),
        ("broadcast_div", [(2, 3, 4), (1,)], {}, (2, 3, 4)),
        ("broadcast_mul", [(4,), (2, 3, 1)], {}, (2, 3, 4)),
        ("broadcast_mul", [(0, 3), (2, 1, 3)], {}, None),  # the open dimension is the output's
        ("Concat", [(2, 3, 4), (2, 5, 4)], {"dim": 1}, (2, 8, 4)),
        ("Concat", [(2, 3, 4), (2, 3, 1)], {"dim": -1}, (2, 3, 5)),
        ("transpose", [(2, 3, 4)], {}, (4, 3, 2)),
        ("transpose", [(2, 3, 4)], {"axes": (1, 0, 2)}, (3, 2, 4)),
        ("Cast", [(2, 3)], {"dtype": "float16"}, (2, 3)),
        ("_contrib_GenAnchor", [(2, 12, 4, 5)], {"scales": (1, 2), "ratios": (0.5, 1, 2)}, (120, 4)),
    ],
)
def test_output_shapes(op, shapes, attrs, expected):
    if expected is None:
        with pytest.raises(ValueError, match="node_output do not follow"):
            inferred(op, *shapes, **attrs)
    else:
        assert inferred(op, *shapes, **attrs) == [expected]


@pytest.mark.parametrize(
    "op, shapes, attrs, message",
    [
        ("Convolution", [(1, 4, 2, 8)], {"num_filter": 6, "kernel": (3, 3)}, "kernel .* does not fit into data"),
        ("Convolution", [(1, 4, 8, 8)], {"num_filter": 6, "kernel": 3}, r"kernel must have 2 numbers, got \(3,\)"),
        ("Convolution", [(1, 4, 8, 8)], {"num_filter": 5, "num_group": 2, "kernel": (1, 1)}, "do not fit"),
        ("Convolution", [(1, 4, 8, 8)], {"num_filter": 0, "kernel": (1, 1)}, "do not fit"),
        ("Convolution", [(1, 4, 8, 8)], {"num_filter": 1, "kernel": (1, 1), "stride": (0, 1)}, "do not fit"),
        (
            "Convolution",
            [(1, 4, 8, 8)],
            {"num_filter": 6, "kernel": (1, 1), "num_group": 3},
            "4 channels .* num_group 3",
        ),
        ("BatchNorm", [(1, 4, 8, 8)], {"axis": 3}, "axis must be 1"),
        ("Pooling", [(1, 4, 8, 8)], {}, "kernel"),
        ("Pooling", [(1, 4, 8, 8)], {"kernel": (2, 2), "pad": (2, 2)}, "do not fit"),
        ("Pooling", [(1, 4, 1, 8)], {"kernel": (2, 2)}, "does not fit into side 1"),
        (
            "Pooling",
            [(1, 4, 3, 8)],
            {"kernel": (2, 2), "stride": (3, 2), "pooling_convention": "full"},
            "the last window of side 3 is padding only",
        ),
        ("UpSampling", [(1, 4, 8, 8)], {"scale": 0, "sample_type": "nearest"}, "scale must be at least 1, got 0"),
        ("slice_like", [(1, 4), (1, 5)], {}, "dimension 1 is too small"),
        ("slice_like", [(1, 4), (1, 5)], {"axes": (2,)}, r"there is no dimension 2 in \(1, 4\)"),
        ("slice_axis", [(1, 4)], {"axis": -3, "begin": 0}, r"there is no dimension -3 in \(1, 4\)"),
        ("slice_axis", [(1, 4)], {"axis": 1, "begin": 4}, "is empty"),
        ("add_n", [(1, 4), (1, 5)], {}, "contradict"),
        ("broadcast_mul", [(2, 3), (2, 4, 1)], {}, "cannot be broadcast"),
        ("elemwise_mul", [(2, 3), (3,)], {}, "contradict"),
        ("broadcast_mul", [(2, 3), (2, 2)], {}, "cannot be broadcast"),
        ("Reshape", [(2, 3)], {"shape": (4, -1)}, "cannot be reshaped"),
        ("transpose", [(2, 3)], {"axes": (0, 0)}, "no permutation"),
        ("Concat", [(2, 3), (3, 4)], {"dim": 1}, "contradict"),
        ("Concat", [(2, 3), (2, 4, 1)], {"dim": 1}, "cannot be joined"),
        ("Concat", [(2, 3), (2, 4)], {"dim": 2}, "cannot be joined along 2"),
        ("_contrib_FocalLoss", [(2, 3), (2,)], {}, "data .N, K, C. must have 3 dimensions"),
        ("_contrib_BBoxNorm", [(2, 3), (2,)], {}, "data .N, 4A, P. must have 3 dimensions"),
        ("_contrib_GenAnchor", [(2, 3, 4)], {}, "must have 4 dimensions"),
        ("_contrib_GenAnchor", [(2, 3, 4, 4)], {"scales": ()}, "anchors need scales and ratios"),
    ],
)
def test_refusals_name_the_node(op, shapes, attrs, message):
    with pytest.raises(ValueError, match=rf"^{op} 'node': .*{message}"):
        inferred(op, *shapes, **{"kernel": (), **attrs} if op == "Convolution" else attrs)


@pytest.mark.parametrize(
    "attrs, message",
    [
        ({"num_anchors": 5}, "12 channels, no multiple of num_anchors 5"),
        ({"num_anchors": 0}, "must be at least 1"),
        ({"num_anchors": 3, "rpn_pre_nms_top_n": 0}, "must be at least 1"),
    ],
)
def test_a_decoder_that_does_not_fit(attrs, message):
    graph = S._contrib_GenProposalRetina(*map(var, "abcd"), name="p", **attrs)
    with pytest.raises(ValueError, match=message):
        graph.infer_shape(a=(2, 12, 4, 5))


@st.composite
def window(draw, max_dilate=1):
    """Draw kernel, stride, pad, dilate of one axis, and a side that the kernel fits into."""
    kernel, stride, dilate = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, max_dilate))
    pad = draw(st.integers(0, kernel // 2))  # torch allows no more
    return kernel, stride, pad, dilate, draw(st.integers(max(1, dilate * (kernel - 1) + 1 - 2 * pad), 14))


@given(window(max_dilate=3), window(max_dilate=3))
@settings(max_examples=60, deadline=None)
def test_the_inferred_shape_of_a_convolution(rows, columns):
    kernel, stride, pad, dilate, sides = zip(rows, columns, strict=True)
    graph = S.Convolution(
        var("x"), kernel=kernel, stride=stride, dilate=dilate, pad=pad, num_filter=2, no_bias=True, name="c"
    )
    data = (1, 2, *sides)
    assert lower(graph, x=data)(x=torch.zeros(data))[0].shape == graph.infer_shape(x=data)[1][0]


@given(window(), window(), st.sampled_from(["max", "avg"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_inferred_shape_of_a_pooling(rows, columns, kind, full):
    kernel, stride, pad, _, sides = zip(rows, columns, strict=True)
    convention = "full" if full else "valid"
    graph = S.Pooling(
        var("x"), kernel=kernel, stride=stride, pad=pad, pool_type=kind, pooling_convention=convention, name="p"
    )
    data = (1, 2, *sides)
    if full and any(math.ceil((side + 2 * p - k) / s) * s >= side + p for k, s, p, _, side in (rows, columns)):
        with pytest.raises(ValueError, match="padding only"):
            graph.infer_shape(x=data)
    else:
        assert lower(graph)(x=torch.zeros(data))[0].shape == graph.infer_shape(x=data)[1][0]


@st.composite
def reshapes(draw):
    """Draw a shape and codes that fit it: each takes some of its dimensions."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple))
    spec, position = [], 0
    while position < len(shape):
        left = len(shape) - position
        code = draw(st.sampled_from([0, "copy", -1, -2, -4] + [-3] * (left > 1)))
        if code == -1 and code in spec:
            code = 0
        spec += {"copy": [shape[position]], -4: [-4, 1, -1]}.get(code, [code])
        position += {-2: left, -3: 2}.get(code, 1)
    return shape, tuple(spec)


@given(reshapes())
@settings(max_examples=60, deadline=None)
def test_the_inferred_shape_of_a_reshape(case):
    shape, spec = case
    data = np.arange(math.prod(shape), dtype=np.float32)
    out = lower(S.Reshape(var("x"), shape=spec, name="r"))(x=torch.from_numpy(data).reshape(shape))[0]
    assert out.shape == infer_reshape(shape, spec)
    assert out.flatten().tolist() == data.tolist()
