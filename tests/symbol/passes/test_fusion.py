import pytest
import torch

import symbol as S
from config.load import load_config
from symbol import Group, lower, var
from symbol.passes import fuse_losses
from tests.small_config import DEMO

FUSED = ("_focal_loss_levels", "_smooth_l1_levels")
SHAPE = {"x": (2, 5, 3, 4)}  # 2 images, 12 cells


def ops(graph):
    return [node.op for node in graph.nodes() if not node.is_variable]


def conv(data, name, num_filter):
    return S.Convolution(data, num_filter=num_filter, kernel=(1, 1), name=name)


def logits(data, name, anchors=2, classes=3):
    """Return (N, A*H*W, C) from a map (N, A*C, H, W)."""
    x = S.Reshape(conv(data, name, anchors * classes), shape=(0, anchors, classes, -1))
    return S.Reshape(S.transpose(x, axes=(0, 1, 3, 2)), shape=(0, -3, 0))


def deltas(data, name, rows=8):
    """Return (N, R, H*W) from a map (N, R, H, W)."""
    return S.Reshape(conv(data, name, rows), shape=(0, 0, -1))


def class_loss(parts=None):
    x = var("x")
    parts = parts or [logits(x, "a"), logits(x, "b")]
    return S._contrib_FocalLoss(S.Concat(*parts, dim=1), var("label"), normalization="valid", name="cls_loss")


def box_product(parts=None, weight=None, x=None):
    x = x or var("x")
    parts = parts or [deltas(x, "a"), deltas(x, "b")]
    difference = S.elemwise_sub(S.Concat(*parts, dim=2), var("target"))
    return S.elemwise_mul(weight or var("weight"), S.smooth_l1(difference, scalar=3.0), name="product")


def losses_and_gradients(graph, monkeypatch, fused, **inputs):
    with monkeypatch.context() as patch:
        if not fused:
            patch.setattr("symbol.passes.pipeline.fuse_losses", lambda symbol: symbol)
        module = lower(graph, **SHAPE)
    outputs = module(**inputs)
    sum(outputs).backward()
    return outputs, {name: p.grad for name, p in module.named_parameters()}


def example():
    random = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(SHAPE["x"], generator=random),
        "label": torch.randint(-1, 4, (2, 48), generator=random).float(),
        "target": torch.randn(2, 8, 24, generator=random),
        "weight": torch.rand(2, 8, 24, generator=random),
    }


def test_class_loss(monkeypatch):
    graph = class_loss()
    assert ops(fuse_losses(graph)) == ["Convolution", "Convolution", "_focal_loss_levels"]
    assert "_contrib_FocalLoss" in ops(graph)
    inputs = {key: value for key, value in example().items() if key in ("x", "label")}
    torch.testing.assert_close(
        losses_and_gradients(graph, monkeypatch, True, **inputs),
        losses_and_gradients(graph, monkeypatch, False, **inputs),
    )


@pytest.mark.parametrize("normalization", ["null", "batch"])
def test_class_loss_of_every_normalization(monkeypatch, normalization):
    x = var("x")
    parts = [logits(x, "a"), logits(x, "b")]
    focal = {"alpha": 0.4, "gamma": 1.5, "grad_scale": 3.0, "normalization": normalization}
    graph = S._contrib_FocalLoss(S.Concat(*parts, dim=1), var("label"), name="cls_loss", **focal)
    inputs = {key: value for key, value in example().items() if key in ("x", "label")}
    torch.testing.assert_close(
        losses_and_gradients(graph, monkeypatch, True, **inputs),
        losses_and_gradients(graph, monkeypatch, False, **inputs),
    )


@pytest.mark.parametrize("divided", [False, True])
def test_box_loss(monkeypatch, divided):
    product = box_product()
    if divided:
        product = S.broadcast_div(product, S.Reshape(var("count"), shape=(1, 1, 1)))
    graph = S.MakeLoss(product, grad_scale=2.0, name="reg_loss")
    fused = ops(fuse_losses(graph))
    assert fused == ["Convolution", "Convolution", "_smooth_l1_levels"] + ["Reshape", "broadcast_div"] * divided + [
        "MakeLoss"
    ]
    inputs = {key: value for key, value in example().items() if key != "label"}
    inputs |= {"count": torch.tensor([5.0])} if divided else {}
    torch.testing.assert_close(
        losses_and_gradients(graph, monkeypatch, True, **inputs),
        losses_and_gradients(graph, monkeypatch, False, **inputs),
    )


def other_uses():
    product = box_product()
    x = var("x")
    return {
        "the product is an output": Group([S.MakeLoss(product), product]),
        "the product is used elsewhere": Group([S.MakeLoss(product), S.Activation(product, act_type="relu")]),
        "the loss is divided by its valid count": S.MakeLoss(product, normalization="valid"),
        "the divisor is not one number": S.MakeLoss(
            S.broadcast_div(product, S.Reshape(var("count"), shape=(-1, 1, 1)))
        ),
        "the weight is computed": S.MakeLoss(box_product(weight=S.Reshape(conv(x, "w", 8), shape=(0, 0, -1)), x=x)),
        "a level is not flattened": S.MakeLoss(box_product([S.Reshape(conv(x, "a", 8), shape=(0, 8, -1))])),
        "classes differ": class_loss([logits(x, "a"), logits(x, "b", anchors=3, classes=2)]),
        "cells are not behind the classes": class_loss([S.Reshape(conv(x, "a", 6), shape=(0, -1, 3))]),
        "the axes are others": class_loss([S.transpose(S.Reshape(conv(x, "a", 6), shape=(0, 0, -1)), axes=(0, 2, 1))]),
    }


@pytest.mark.parametrize("case", list(other_uses()))
def test_other_patterns_stay(case):
    graph = other_uses()[case]
    assert not set(ops(fuse_losses(graph))) & set(FUSED)
    assert fuse_losses(graph).entries == graph.entries


@pytest.mark.parametrize("sync_loss", [False, True])
def test_a_config_is_fused(sync_loss):
    config = load_config(DEMO, is_train=True, overrides=(f"RpnParam.sync_loss={sync_loss}",))
    graph = config.ModelParam.train_symbol
    code = S.lower(graph).code
    assert code.count("focal_loss_levels(") == code.count("smooth_l1_levels(") == 1
    assert "cls_logit_concat" not in code
    assert "transpose" not in code
