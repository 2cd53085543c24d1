import math
from pathlib import Path

import numpy as np
import pytest
import torch

from operator_cxx.smooth_l1 import smooth_l1

GOLDEN = Path(__file__).parents[1] / "golden"


def test_by_hand():
    # scalar 2: quadratic 2 x^2 below 1/4, then |x| - 1/8.
    x = torch.tensor([-1.0, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5], dtype=torch.float64)
    assert smooth_l1(x, 2.0).tolist() == [0.875, 0.125, 0.03125, 0.0, 0.03125, 0.125, 0.375]


@pytest.mark.parametrize("case", ["fpn_128", "nasfpn_128x256", "tdbu_128"])
def test_box_loss_of_the_original(case):
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{case}.npz").items()}
    label = golden["label"]
    # The label in the layout of the deltas: levels of (A, H*W) side by side become (A, sum of H*W).
    cells = [16 * 16, 8 * 8, 4 * 4, 2 * 2, 1]
    cells = [c * (golden["train_bbox"].shape[2] // 341) for c in cells]
    levels = [part.reshape(len(label), 9, -1) for part in label.split([9 * c for c in cells], dim=1)]
    weight = (torch.cat(levels, 2) >= 1).repeat_interleave(4, dim=1)
    loss = smooth_l1((golden["train_bbox"] - golden["reg_target"]) * weight, math.sqrt(1 / 0.11)).sum()
    assert (loss / ((label >= 1).sum() + 1)).item() == pytest.approx(golden["loss"][1].item(), rel=1e-5)


def test_gradient():
    x = torch.tensor([-3.0, -0.2, -0.05, 0.0, 0.05, 0.2, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: smooth_l1(value, 3.0), x)


def test_scalar_must_be_positive():
    with pytest.raises(ValueError, match="expected scalar > 0, got 0"):
        smooth_l1(torch.zeros(1), 0.0)
