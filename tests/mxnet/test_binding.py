"""The operators in MXNet: invalid arguments, gradients, and their CUDA half, which is compiled but not run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mxnet", reason="MXNet 1.9.1 is not in this environment: make mxnet-test runs these")

import symbol as S
from core.engine.schedule import LrSchedule
from core.engine_mxnet.graph import MxnetLrScheduler, load_symbol
from operator_cxx.mxnet_ops import load_mxnet
from operator_cxx.mxnet_ops.build import build
from operator_cxx.reference.focal_loss import focal_loss
from symbol import var

ROOT = Path(__file__).parents[2]


def random_logits() -> tuple[np.ndarray, np.ndarray]:
    r = np.random.RandomState(0)
    return r.standard_normal((2, 6, 3)).astype(np.float32), r.randint(-1, 4, (2, 6)).astype(np.float32)


@pytest.mark.parametrize("divisor", [1.0, 5.0])
def test_focal_loss_under_a_make_loss(divisor: float) -> None:
    """With out_grad the head gradient is used: here that of a division by the synced count."""
    mx = load_mxnet()
    logit, label = random_logits()
    loss = S._contrib_FocalLoss(var("data"), var("label"), out_grad=True, name="focal")
    loss = S.MakeLoss(S.broadcast_div(loss, var("count"), name="mean"), name="loss")
    arrays = {name: mx.nd.array(value) for name, value in (("data", logit), ("label", label))}
    arrays["count"] = mx.nd.full((1, 1, 1), divisor)
    gradient = {"data": mx.nd.zeros(logit.shape)}
    request = {"data": "write", "label": "null", "count": "null"}
    executor = load_symbol(loss).bind(mx.cpu(), arrays, gradient, request)
    (output,) = executor.forward(is_train=True)
    executor.backward()
    expected = torch.from_numpy(logit).requires_grad_()
    scale = torch.full((2,), 1 / divisor, dtype=torch.float64)
    value = focal_loss(expected, torch.from_numpy(label), alpha=0.25, gamma=2.0, scale=scale)
    value.backward()
    assert float(output.asnumpy().sum()) == pytest.approx(value.item(), rel=1e-5)
    assert expected.grad is not None
    np.testing.assert_allclose(gradient["data"].asnumpy(), expected.grad.numpy(), rtol=1e-4, atol=1e-7)


def test_an_ignored_anchor_may_have_any_logit() -> None:
    mx = load_mxnet()
    logit, label = random_logits()
    label[0, 1] = -1
    logit[0, 1] = [np.inf, -np.inf, np.nan]
    output = mx.nd.contrib.FocalLoss(mx.nd.array(logit), mx.nd.array(label)).asnumpy()
    assert np.isfinite(np.delete(output.reshape(12, 3), 1, axis=0)).all()
    assert (output[0, 1, :2] == 0).all()


@pytest.mark.parametrize(
    "op, attrs, message",
    [
        ("FocalLoss", {"alpha": "much"}, "attribute 'alpha': expected numbers, got 'much'"),
        ("FocalLoss", {"gama": 2}, "no attribute 'gama'; expected one of alpha, gamma"),
        ("FocalLoss", {"gamma": -1}, "attribute 'gamma': expected a number from 0 on"),
        ("FocalLoss", {"normalization": "mean"}, "expected null, batch or valid, got 'mean'"),
        ("FocalLoss", {"out_grad": "maybe"}, "expected True or False, got 'maybe'"),
        ("GenProposalRetina", {}, "'num_anchors' is missing"),
        ("GenProposalRetina", {"num_anchors": 1.5}, "expected an integer, got '1.5'"),
        ("GenProposalRetina", {"num_anchors": 1, "iou_loss": True}, "'iou_loss': expected False"),
        ("GenProposalRetina", {"num_anchors": 1, "anchor_std": (0.1, 0.1, 0.2, 0.2)}, "'anchor_std': expected ones"),
        ("GenAnchor", {"scales": ()}, "expected 1 to 64, got 0"),
    ],
)
def test_attributes_that_are_refused(op: str, attrs: Mapping[str, Any], message: str) -> None:
    mx = load_mxnet()
    inputs = [mx.sym.var(f"x{i}") for i in range({"GenProposalRetina": 4, "GenAnchor": 1}.get(op, 2))]
    with pytest.raises(mx.base.MXNetError) as error:
        getattr(mx.sym.contrib, op)(*inputs, **attrs)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "op, shapes, message",
    [
        ("FocalLoss", [(2, 5, 3), (2, 4)], "label should be (2, 5), but it is (2, 4)"),
        ("FocalLoss", [(2, 5), (2, 5)], "data must be (N, K, C), got (2, 5)"),
        ("BBoxNorm", [(2, 6, 3), (2, 3)], "data must be (N, 4A, P), got (2, 6, 3)"),
        ("GenAnchor", [(2, 6, 3)], "cls_prob must be (N, A*C, H, W), got (2, 6, 3)"),
    ],
)
def test_shapes_that_are_refused(op: str, shapes: list[tuple[int, ...]], message: str) -> None:
    mx = load_mxnet()
    with pytest.raises(mx.base.MXNetError) as error:
        getattr(mx.nd.contrib, op)(*(mx.nd.zeros(shape) for shape in shapes))
    assert message in str(error.value)


def test_other_types_are_refused() -> None:
    mx = load_mxnet()
    with pytest.raises(mx.base.MXNetError, match="expected float32 inputs"):
        mx.nd.contrib.FocalLoss(mx.nd.zeros((1, 2, 3), dtype="float16"), mx.nd.zeros((1, 2)))


def test_the_learning_rate_of_an_update() -> None:
    """MXNet's optimizer counts updates from 1."""
    mx = load_mxnet()
    schedule = LrSchedule(
        lr=0.5, iter_per_epoch=8, end_epoch=1, lr_epoch=(0.5,), lr_factor=0.1, warmup_epoch=0.25, warmup_lr_factor=0.5
    )
    sgd = mx.optimizer.SGD(learning_rate=schedule.lr, lr_scheduler=MxnetLrScheduler(schedule))
    weight, gradient = mx.nd.zeros(1), mx.nd.ones(1)
    for step in range(8):
        before = weight.asscalar()
        sgd.update(0, weight, gradient, None)
        assert before - weight.asscalar() == pytest.approx(schedule.lr_at(step), rel=1e-4)


def test_a_library_that_is_up_to_date_is_not_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "necklace_mxnet.so"
    assert build(path)
    assert not build(path)
    program = "import sys; from operator_cxx.mxnet_ops import load_mxnet; print(load_mxnet().__version__)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "1.9.1", done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
def test_the_cuda_half_compiles(tmp_path: Path) -> None:
    assert build(tmp_path / "necklace_mxnet.so", archs="75,90+PTX")
