"""Fusing convolutions, sums and ReLUs of a test graph. Values: see test_norm_folding's random graphs."""

import pytest

import symbol as S
from symbol import Group, var
from symbol.passes import fuse_inference


def ops(graph):
    return [node.op for node in graph.nodes() if not node.is_variable]


def conv(data, name="c", **attrs):
    return S.Convolution(data, num_filter=4, kernel=(3, 3), pad=(1, 1), name=name, **attrs)


def relu(data, name="r"):
    return S.Activation(data, act_type="relu", name=name)


X, Y = var("x"), var("y")


@pytest.mark.parametrize(
    "graph, expect",
    [
        (relu(conv(X)), ["_convolution_relu"]),
        (conv(X) + Y, ["_convolution_add"]),
        (Y + conv(X), ["_convolution_add"]),
        (S.add_n(Y, conv(X)), ["_convolution_add"]),
        (relu(S.add_n(conv(X), conv(Y, "d"))), ["Convolution", "_convolution_add"]),
        (relu(S.add_n(X, Y)), ["_add_relu"]),
        (relu(S.add_n(X, Y, conv(X))), ["Convolution", "_add_relu"]),
        (relu(X), ["Activation"]),
        (S.Activation(conv(X), act_type="sigmoid"), ["Convolution", "Activation"]),
        (relu(S.elemwise_sub(conv(X), Y)), ["Convolution", "elemwise_sub", "Activation"]),
        (Group([relu(c := conv(X)), c]), ["Convolution", "Activation"]),
        ((c := conv(X)) + c, ["Convolution", "elemwise_add"]),
        (Group([relu(s := conv(X) + Y), s]), ["_convolution_add", "Activation"]),
        (relu(relu(conv(X)), "r2"), ["_convolution_relu", "Activation"]),
    ],
)
def test_what_is_fused(graph, expect):
    given = dict.fromkeys(graph.list_inputs(), (1, 4, 5, 5))
    shapes = graph.infer_shape(**given)
    text = graph.tojson()
    fused = fuse_inference(graph)
    assert ops(fused) == expect
    assert graph.tojson() == text
    assert fused.list_outputs() == graph.list_outputs()
    assert fused.infer_shape(**given)[1] == shapes[1]


def test_the_shape_of_a_sum_follows_from_either_term():
    fused = fuse_inference(conv(X, no_bias=True) + Y)
    assert fused.infer_shape(x=(1, 3, 5, 5))[0] == [(1, 3, 5, 5), (1, 4, 5, 5), (4, 3, 3, 3)]
    with pytest.raises(ValueError, match="contradict"):
        fused.infer_shape(x=(1, 3, 5, 5), y=(1, 4, 5, 1))
