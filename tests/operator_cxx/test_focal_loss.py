import math
from pathlib import Path

import numpy as np
import pytest
import torch

from operator_cxx.focal_loss import focal_loss

GOLDEN = Path(__file__).parents[1] / "golden"


def slow_focal_loss(logit, label, alpha, gamma):
    """The sum over all pairs by the definition, one by one in Python floats."""
    total = 0.0
    for row, cls in zip(logit.reshape(-1, logit.shape[-1]).tolist(), label.flatten().tolist(), strict=True):
        for c, x in enumerate(row, start=1):
            p = 1 / (1 + math.exp(-x))
            if cls == c:
                total -= alpha * (1 - p) ** gamma * math.log(p)
            elif cls >= 0:
                total -= (1 - alpha) * p**gamma * math.log(1 - p)
    return total


@pytest.mark.parametrize("case", ["fpn_128", "nasfpn_128x256", "tdbu_128"])
def test_loss_of_the_original(case):
    golden = np.load(GOLDEN / f"{case}.npz")
    logit, label = torch.from_numpy(golden["train_cls"]), torch.from_numpy(golden["label"])
    loss = focal_loss(logit, label, alpha=0.25, gamma=2.0)
    assert loss.item() == pytest.approx(golden["loss"][0], rel=1e-5)


def test_by_hand():
    # p = 0.5 everywhere. Anchor 1 (class 2): 0.75 * 0.25 ln2 + 0.25 * 0.25 ln2; anchor 2 (background):
    # 2 * 0.75 * 0.25 ln2; anchor 3 (ignored): 0. One foreground anchor, so the divisor is 2.
    loss = focal_loss(torch.zeros(1, 3, 2), torch.tensor([[2.0, 0.0, -1.0]]), alpha=0.25, gamma=2.0)
    assert loss.item() == pytest.approx((0.25 + 0.375) * math.log(2) / 2)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 0.0), (0.75, 0.5), (1.0, 1.5), (0.25, 5.0)])
def test_against_the_definition(alpha, gamma):
    random = torch.Generator().manual_seed(0)
    logit = torch.randn(2, 30, 4, generator=random, dtype=torch.float64) * 4
    label = torch.randint(-1, 5, (2, 30), generator=random)
    loss = focal_loss(logit, label, alpha=alpha, gamma=gamma)
    expected = slow_focal_loss(logit, label, alpha, gamma)
    assert loss.item() == pytest.approx(expected / ((label >= 1).sum().item() + 1), rel=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient(gamma):
    logit = torch.linspace(-6, 6, 24, dtype=torch.float64).reshape(2, 4, 3).requires_grad_()
    label = torch.tensor([[0, 1, 2, 3], [-1, 3, 0, 1]])
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, label, alpha=0.25, gamma=gamma), logit)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [20.0, 100.0, 1e4])
def test_huge_logits(gamma, size):
    # Two sure and right pairs cost nothing; two sure and wrong ones cost |logit| times their weight.
    logit = torch.tensor([[[size, -size], [-size, size]]], requires_grad=True)
    label = torch.tensor([[1.0, 1.0]])
    loss = focal_loss(logit, label, alpha=0.25, gamma=gamma)
    assert loss.item() == pytest.approx((0.25 + 0.75) * size / 3, rel=1e-6)
    loss.backward()
    expected = torch.tensor([[[0.0, 0.0], [-0.25, 0.75]]]) / 3
    torch.testing.assert_close(logit.grad, expected, rtol=1e-6, atol=1e-7)


def test_an_ignored_anchor_gives_no_gradient():
    logit = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    focal_loss(logit, torch.tensor([[-1, 0, 2]]), alpha=0.25, gamma=2.0).backward()
    assert (logit.grad != 0).tolist() == [[[False, False], [True, True], [True, True]]]


def test_normalizer():
    logit, label = torch.zeros(2, 1, 1), torch.tensor([[1], [0]])
    loss = [0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)]  # of each image

    def divided_by(normalizer):
        return focal_loss(logit, label, alpha=0.25, gamma=2.0, normalizer=torch.tensor(normalizer)).item()

    assert divided_by(4.0) == pytest.approx(sum(loss) / 4)
    assert divided_by([4.0, 4.0]) == pytest.approx(sum(loss) / 4)
    assert divided_by([1.0, 2.0]) == pytest.approx(loss[0] + loss[1] / 2)


def test_half_precision_is_computed_in_float32():
    logit = torch.tensor([[[-12.0, 3.0]]], dtype=torch.float16, requires_grad=True)
    label = torch.tensor([[1]])
    loss = focal_loss(logit, label, alpha=0.25, gamma=2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == focal_loss(logit.detach().float(), label, alpha=0.25, gamma=2.0).item()
    loss.backward()
    assert logit.grad.dtype == torch.float16


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"label \(N, K\), got \(1, 3, 2\) and \(1, 2\)"):
        focal_loss(torch.zeros(1, 3, 2), torch.zeros(1, 2), alpha=0.25, gamma=2.0)
    with pytest.raises(ValueError, match="expected gamma >= 0, got -1"):
        focal_loss(torch.zeros(1, 3, 2), torch.zeros(1, 3), alpha=0.25, gamma=-1)
