"""Smooth L1: MXNet's elementwise operator, and the weighted loss.

Shapes: N images, R = 4A rows, H x W cells of a level, P cells of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def smooth_l1(x: Tensor, scalar: float) -> Tensor:
    """Return 0.5 scalar^2 x^2 where |x| < 1 / scalar^2, else |x| - 0.5 / scalar^2, elementwise.

    Source: Girshick 2015, "Fast R-CNN", equation 3, with MXNet's scale.
    """
    if scalar <= 0:
        raise ValueError(f"smooth_l1: expected scalar > 0, got {scalar}")
    s2 = scalar * scalar
    size = x.abs()
    near = x.clamp(-1 / s2, 1 / s2)  # keeps the gradient of the other branch finite
    return torch.where(size < 1 / s2, 0.5 * s2 * near * near, size - 0.5 / s2)


def smooth_l1_loss(delta: Sequence[Tensor], target: Tensor, weight: Tensor, *, beta: float, scale: Tensor) -> Tensor:
    """Return `operator_cxx.smooth_l1.smooth_l1_loss` with the factors `scale` (N,) of the images' losses."""
    x = torch.cat([level.flatten(2) for level in delta], dim=2)  # (N, R, P)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    term = weight * smooth_l1(x - target, math.sqrt(1 / beta))  # (N, R, P)
    return (term.sum(dim=(1, 2)) * scale).sum().to(x.dtype)
