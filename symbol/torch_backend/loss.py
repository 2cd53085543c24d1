"""Losses. N images, K anchors of all levels, C classes, A anchors per cell, H, W.

They return scalars: where MXNet defines a loss by its gradient alone, its value here is the one with this gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from operator_cxx.focal_loss import focal_loss as focal_loss_op
from operator_cxx.focal_loss import focal_loss_levels as focal_loss_levels_op
from operator_cxx.reference.smooth_l1 import smooth_l1 as smooth_l1_op
from operator_cxx.smooth_l1 import smooth_l1_loss
from symbol.torch_backend.registry import lowers


@lowers("smooth_l1")
def smooth_l1(data: Tensor, *, scalar: float, **_: Any) -> Tensor:
    return smooth_l1_op(data, scalar)


@lowers("MakeLoss")
def make_loss(data: Tensor, *, grad_scale: float, normalization: str, valid_thresh: float) -> Tensor:
    """Return the sum (), whose gradient is grad_scale everywhere, from data of any shape."""
    total = data.sum() * grad_scale
    if normalization == "batch":  # MXNet counts rows: all dimensions but the last
        return total / max(1, math.prod(data.shape[:-1]))
    if normalization == "valid":
        return total / (data > valid_thresh).sum().clamp(min=1)
    return total


@lowers("_contrib_FocalLoss")
def focal_loss(
    data: Tensor,
    label: Tensor,
    *,
    alpha: float,
    gamma: float,
    grad_scale: float,
    normalization: str,
    **_: Any,
) -> Tensor:
    """Return the loss () of logits (N, K, C) and labels (N, K); "valid" divides by the foreground count + 1."""
    normalizer = _focal_normalizer(label, normalization)
    return focal_loss_op(data, label, alpha=alpha, gamma=gamma, normalizer=normalizer) * grad_scale


@lowers("_focal_loss_levels")
def focal_loss_levels(
    label: Tensor,
    *maps: Tensor,
    num_class: int,
    alpha: float,
    gamma: float,
    grad_scale: float,
    normalization: str,
    **_: Any,
) -> Tensor:
    """Return the loss () of `focal_loss` from the logits of every level (N, A*C, H, W)."""
    normalizer = _focal_normalizer(label, normalization)
    loss = focal_loss_levels_op(maps, label, num_class=num_class, alpha=alpha, gamma=gamma, normalizer=normalizer)
    return loss * grad_scale


def _focal_normalizer(label: Tensor, normalization: str) -> Tensor | None:
    """Return the divisor of the sum (); None for the operator's own, the foreground count + 1."""
    if normalization == "valid":
        return None
    return torch.full((), float(label.shape[0] if normalization == "batch" else 1), device=label.device)


@lowers("_smooth_l1_levels")
def smooth_l1_levels(target: Tensor, weight: Tensor, *maps: Tensor, scalar: float, **_: Any) -> Tensor:
    """Return the sum () of weight * smooth_l1(deltas - target) from the deltas of every level (N, 4A, H, W)."""
    return smooth_l1_loss(maps, target, weight, beta=1 / scalar**2)


@lowers("_contrib_BBoxNorm")
def bbox_norm(data: Tensor, label: Tensor, *, normalization: str) -> Tensor:
    """Return the data; divide its gradient by the foreground count + 1 ("valid") or by N ("batch")."""
    if normalization == "null":
        return data
    scaled = data / (data.shape[0] if normalization == "batch" else _foreground_count(label) + 1)
    return scaled + (data - scaled).detach()


@lowers("_foreground_mean")
def foreground_mean(loss: Tensor, label: Tensor) -> Tensor:
    return loss / (_foreground_count(label) + 1)


def _foreground_count(label: Tensor) -> Tensor:
    return (label >= 1).sum().to(torch.float32)
