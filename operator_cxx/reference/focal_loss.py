"""Focal loss on sigmoid probabilities, by its definition.

Shapes: N images, K anchors of all levels, C foreground classes, H x W cells of a level, A anchors per cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(logit: Tensor, label: Tensor, *, alpha: float, gamma: float, scale: Tensor) -> Tensor:
    """`operator_cxx.focal_loss.focal_loss` with scale (N,), what the terms of each image are multiplied by."""
    counts = (label >= 0)[..., None]  # (N, K, 1)
    positive = label[..., None] == torch.arange(1, logit.shape[2] + 1, device=label.device)  # (N, K, C)
    x = logit.to(torch.promote_types(logit.dtype, torch.float32))
    x = torch.where(counts, x, 0.0)  # else NaN at an ignored anchor would reach the gradient
    term = _term(torch.where(positive, -x, x), gamma)  # (N, K, C)
    term = torch.where(positive, alpha * term, (1 - alpha) * term)
    return (torch.where(counts, term, 0.0).sum(dim=(1, 2)) * scale).sum().to(x.dtype)


def focal_loss_levels(
    logit: Sequence[Tensor], label: Tensor, *, num_class: int, alpha: float, gamma: float, scale: Tensor
) -> Tensor:
    """`operator_cxx.focal_loss.focal_loss_levels` with scale (N,)."""
    anchors = [level.flatten(2).unflatten(1, (-1, num_class)).transpose(2, 3).flatten(1, 2) for level in logit]
    return focal_loss(torch.cat(anchors, dim=1), label, alpha=alpha, gamma=gamma, scale=scale)  # (N, K, C)


def _term(z: Tensor, gamma: float) -> Tensor:
    """sigmoid(z)^gamma softplus(z), elementwise.

    With z = -logit at the positive class and z = logit elsewhere that is the loss of both. The power is taken as
    exp(gamma log sigmoid(z)), so that it and its gradient are right for every z and gamma >= 0, and softplus as
    -log sigmoid(-z), which is exact in every float type.
    """
    log_sigmoid = F.logsigmoid(z).clamp(min=-1e4)  # as 0 times infinity is not 0
    return torch.exp(gamma * log_sigmoid) * -F.logsigmoid(-z)
