import json

import pytest

import symbol as S
from symbol import Group, load_json, var
from symbol.shape import propagate


def conv(data, name="c", **kwargs):
    return S.Convolution(data, name=name, **{"num_filter": 8, "kernel": (3, 3), **kwargs})


def shapes_of(graph, **given):
    """Return the shapes of arguments, outputs and auxiliary states by name."""
    names = (graph.list_arguments(), graph.list_outputs(), graph.list_auxiliary_states())
    parts = zip(names, graph.infer_shape(**given), strict=True)
    return {name: shape for part, shapes in parts for name, shape in zip(part, shapes, strict=True)}


def test_forwards():
    x = S.BatchNorm(conv(var("data"), pad=(1, 1), stride=(2, 2)), name="b")
    assert shapes_of(x, data=(2, 3, 9, 12)) == {
        **{"data": (2, 3, 9, 12), "c_weight": (8, 3, 3, 3), "c_bias": (8,)},
        **{"b_gamma": (8,), "b_beta": (8,), "b_moving_mean": (8,), "b_moving_var": (8,)},
        "b_output": (2, 8, 5, 6),  # (9 + 2 - 3) // 2 + 1 = 5, (12 + 2 - 3) // 2 + 1 = 6
    }


def test_order_is_that_of_the_lists():
    x = S.BatchNorm(conv(var("data"), no_bias=True), name="b")
    assert x.infer_shape(data=(1, 3, 3, 3)) == (
        [(1, 3, 3, 3), (8, 3, 3, 3), (8,), (8,)],
        [(1, 8, 1, 1)],
        [(8,), (8,)],
    )


def test_backwards_to_labels():
    logit = S.Reshape(conv(var("data"), kernel=(1, 1)), shape=(0, 4, -1), name="r")
    logit = S.transpose(logit, axes=(0, 2, 1), name="t")  # (N, 2*H*W, 4)
    graph = S._contrib_FocalLoss(logit, var("label"), name="loss")
    assert shapes_of(graph, data=(2, 3, 5, 5))["label"] == (2, 50)


def test_backwards_through_elementwise_operators_and_transpose():
    x, y = var("x"), var("y")
    graph = S.elemwise_add(S.transpose(x, axes=(2, 0, 1), name="t"), S.Activation(y, act_type="relu", name="r"))
    assert graph.infer_shape(x=(3, 4, 2)) == ([(3, 4, 2), (2, 3, 4)], [(2, 3, 4)], [])
    assert graph.infer_shape(y=(2, 3, 4)) == ([(3, 4, 2), (2, 3, 4)], [(2, 3, 4)], [])


def test_backwards_through_batch_norm():
    graph = S.elemwise_add(S.BatchNorm(var("x"), name="b"), var("y"), name="s")
    assert shapes_of(graph, y=(2, 3, 4, 4)) == {
        **{"x": (2, 3, 4, 4), "y": (2, 3, 4, 4), "s_output": (2, 3, 4, 4)},
        **{f"b_{parameter}": (3,) for parameter in ("gamma", "beta", "moving_mean", "moving_var")},
    }


def test_backwards_to_the_inputs_of_a_decoder():
    graph = S._contrib_GenProposalRetina(
        *map(var, ("prob", "delta", "info", "anchors")), num_anchors=3, rpn_pre_nms_top_n=7, name="p"
    )
    assert shapes_of(graph, prob=(2, 12, 4, 5)) == {
        **{"prob": (2, 12, 4, 5), "delta": (2, 12, 4, 5), "info": (2, 3), "anchors": (60, 4)},
        **{"p_output": (2, 7, 4), "p_scores": (2, 7, 5)},  # 4 classes and the background
    }


def test_a_parameter_may_be_given_instead():
    graph = S._contrib_BBoxNorm(var("delta"), var("label"), name="n")
    assert graph.infer_shape(delta=(2, 8, 10)) == ([(2, 8, 10), (2, 20)], [(2, 8, 10)], [])


def test_hints_fill_what_is_open():
    data = var("data", shape=(0, 3, 0, 0))
    graph = conv(data, no_bias=True)
    known = {node.name: shape for (node, _), shape in propagate(graph.nodes(), {}).items()}
    assert known == {"data": (0, 3, 0, 0), "c_weight": (8, 3, 3, 3), "c": (0, 8, 0, 0)}
    assert graph.infer_shape(data=(2, 0, 5, 5))[0] == [(2, 3, 5, 5), (8, 3, 3, 3)]


def test_an_input_on_which_nothing_depends_comes_back_open():
    graph = S.slice_axis(var("count", shape=(0,)), axis=0, begin=0, end=1, name="first")
    assert graph.infer_shape() == ([(0,)], [(1,)], [])


def test_too_little_is_known():
    graph = Group([conv(var("data")), S.BatchNorm(var("other"), name="b")])
    with pytest.raises(ValueError, match=r"c_weight, b_gamma, .* do not follow from nothing; give .*data, other$"):
        graph.infer_shape()
    with pytest.raises(ValueError, match=r"b_gamma.* do not follow from data=\(1, 3, 5, 5\); give the shape of other$"):
        graph.infer_shape(data=(1, 3, 5, 5))
    with pytest.raises(ValueError, match="c_output do not follow"):
        conv(var("data"), no_bias=True).infer_shape(data=(0, 3, 5, 5))


@pytest.mark.parametrize(
    "make, given, message",
    [
        (
            lambda: S.elemwise_add(var("x"), var("y"), name="s"),
            {"x": (2, 3), "y": (2, 4)},
            r"elemwise_add 's': shapes \(2, 3\) and \(2, 4\) contradict .*inputs: lhs \(2, 3\), rhs \(2, 4\)",
        ),
        (
            lambda: conv(var("x"), weight=var("w")),
            {"x": (1, 3, 5, 5), "w": (8, 4, 3, 3)},
            r"Convolution 'c': 'weight' should be \(8, 3, 3, 3\), but it is \(8, 4, 3, 3\)",
        ),
        (
            lambda: conv(var("x", shape=(0, 3, 0, 0))),
            {"x": (1, 4, 5, 5)},
            r"variable 'x': shapes \(0, 3, 0, 0\) and \(1, 4, 5, 5\) contradict",
        ),
        (
            lambda: S._contrib_FocalLoss(var("x"), var("label"), name="loss"),
            {"x": (2, 30, 4), "label": (2, 40)},
            r"_contrib_FocalLoss 'loss': 'label' should be \(2, 30\), but it is \(2, 40\)",
        ),
        (lambda: conv(var("x")), {"x": (1, 3, 5)}, r"'c': data must have 4 dimensions, got \(1, 3, 5\)"),
        (lambda: conv(var("x")), {"y": (1,)}, "no argument 'y'; nearest: x"),
        (lambda: conv(var("x")), {"x": (1, -3, 5, 5)}, r"shape of 'x' must be whole numbers .*got \(1, -3, 5, 5\)"),
        (lambda: conv(var("x")), {"x": (1, 3, 5.5, 5)}, "shape of 'x' must be whole numbers"),
        (lambda: conv(var("x")), {"x": None}, "shape of 'x' must be whole numbers .*got None"),
        (lambda: conv(var("x", attr={"__shape__": "(1, 3"})), {}, "shape of 'x' must be whole numbers"),
        (lambda: conv(var("x", attr={"__shape__": "'ab'"})), {}, "shape of 'x' must be whole numbers"),
        (lambda: var("x") + var("x"), {"x": (1,)}, "several variables are named x;"),
        (lambda: conv(conv(var("x"))), {"x": (1, 8, 9, 9)}, "several variables are named c_weight, c_bias;"),
    ],
)
def test_contradictions(make, given, message):
    with pytest.raises(ValueError, match=message):
        make().infer_shape(**given)


def chain(length: int) -> list[dict]:
    nodes = [{"op": "null", "name": "x"}]
    return nodes + [{"op": "MakeLoss", "name": f"n{i}", "inputs": [[i, 0]]} for i in range(length)]


def test_a_shape_propagates_up_a_long_chain():
    last = {"op": "elemwise_add", "name": "s", "inputs": [[2000, 0], [2001, 0]]}
    known = {"op": "null", "name": "y", "attrs": {"__shape__": "(1, 2)"}}
    graph = load_json(json.dumps({"nodes": [*chain(2000), known, last], "heads": [[2002, 0]]}))
    assert graph.infer_shape() == ([(1, 2), (1, 2)], [(1, 2)], [])


@pytest.mark.parametrize(
    "attrs",
    [{"op": "Concat", "attrs": {"num_args": "2", "dim": "0"}}, {"op": "Reshape", "attrs": {"shape": "(-2, 1)"}}],
)
def test_shapes_that_grow_without_end(attrs):
    nodes = [{"op": "null", "name": "x"}]
    nodes += [{**attrs, "name": f"n{i}", "inputs": [[i, 0]] * (2 if attrs["op"] == "Concat" else 1)} for i in range(99)]
    graph = load_json(json.dumps({"nodes": nodes, "heads": [[99, 0]]}))
    with pytest.raises(ValueError, match="expected 32 at most, each below 2"):
        graph.infer_shape(x=(1, 2))
