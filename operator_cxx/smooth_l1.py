"""Smooth L1, as MXNet's operator of that name defines it."""

from __future__ import annotations

import torch
from torch import Tensor


def smooth_l1(x: Tensor, scalar: float) -> Tensor:
    """Elementwise: 0.5 scalar^2 x^2 where |x| < 1 / scalar^2, else |x| - 0.5 / scalar^2.

    Source: Girshick 2015, "Fast R-CNN", equation 3, with MXNet's scale.
    """
    if scalar <= 0:
        raise ValueError(f"smooth_l1: expected scalar > 0, got {scalar}")
    s2 = scalar * scalar
    size = x.abs()
    return torch.where(size < 1 / s2, 0.5 * s2 * x * x, size - 0.5 / s2)
