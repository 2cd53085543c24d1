import pytest
import torch

import symbol as S
from symbol import Group, lower, var
from symbol.passes import hoist_bbox_norm


def ops(graph):
    return [node.op for node in graph.nodes() if not node.is_variable]


def conv(data, name):
    """(N, 4, H, W)."""
    return S.Convolution(data, num_filter=4, kernel=(1, 1), no_bias=True, name=name)


def box_loss():
    """Return the norm and the loss of the deltas (N, 4, 9) that a convolution predicts for one anchor in 9 cells."""
    delta = S.Reshape(conv(var("x"), "c"), shape=(0, 0, -1), name="flat")
    norm = S._contrib_BBoxNorm(delta, var("label"), name="norm")
    return norm, S.MakeLoss(S.elemwise_mul(var("weight"), norm, name="weighted"), name="loss")


def test_the_norm_moves_behind_its_loss():
    _, loss = box_loss()
    hoisted = hoist_bbox_norm(loss)
    assert ops(hoisted) == ["Convolution", "Reshape", "elemwise_mul", "MakeLoss", "_foreground_mean"]
    assert hoisted.infer_shape(x=(1, 2, 3, 3), label=(1, 9))[1] == [(1, 4, 9)]
    assert ops(loss) == ["Convolution", "Reshape", "_contrib_BBoxNorm", "elemwise_mul", "MakeLoss"]


def test_two_norms_under_one_loss_stay():
    a = S._contrib_BBoxNorm(conv(var("x"), "a"), var("label"), name="n1")
    b = S._contrib_BBoxNorm(conv(var("x2"), "b"), var("label2"), name="n2")
    loss = S.MakeLoss(a + b, name="loss")
    assert hoist_bbox_norm(loss) is loss


@pytest.mark.parametrize("normalization", ["batch", "null"])
def test_another_normalization_stays(normalization):
    norm = S._contrib_BBoxNorm(conv(var("x"), "c"), var("label"), normalization=normalization, name="n")
    loss = S.MakeLoss(norm, name="loss")
    assert hoist_bbox_norm(loss) is loss


def test_a_way_around_the_norm_keeps_it():
    norm, _ = box_loss()
    loss = S.MakeLoss(norm + conv(var("y"), "around"), name="loss")
    assert hoist_bbox_norm(loss) is loss


def test_a_norm_with_another_user_stays():
    norm, loss = box_loss()
    other = S.MakeLoss(norm + conv(var("y"), "around"), name="other")
    graph = Group([loss, other])
    assert hoist_bbox_norm(graph) is graph


def test_a_loss_without_a_norm_stays():
    loss = S.MakeLoss(conv(var("x"), "c"), name="loss")
    assert hoist_bbox_norm(loss) is loss


def gradient_of_weight(graph, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr("symbol.passes.pipeline.hoist_bbox_norm", lambda symbol: symbol)
    x = torch.arange(18.0).reshape(1, 2, 3, 3) / 18
    label = torch.tensor([[1.0, 0, 2, -1, 0, 0, 0, 0, 3]])
    module = lower(graph, x=x.shape)
    loss = module(x=x, weight=torch.ones(1, 4, 9), label=label)[0]
    loss.backward()
    return loss.item(), module.c_weight.grad


def test_moving_the_norm_changes_the_value_and_no_gradient(monkeypatch):
    _, loss = box_loss()
    value, gradient = gradient_of_weight(loss)
    value_in_place, gradient_in_place = gradient_of_weight(loss, monkeypatch)
    torch.testing.assert_close(gradient, gradient_in_place)
    assert gradient.abs().min() > 0
    assert value == pytest.approx(value_in_place / 4)  # three foreground anchors
