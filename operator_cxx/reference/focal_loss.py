"""Focal loss on sigmoid probabilities.

Shapes: N images, K anchors of all levels, C foreground classes, H x W cells of a level, A anchors per cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(logit: Tensor, label: Tensor, *, alpha: float, gamma: float, scale: Tensor) -> Tensor:
    """Return `operator_cxx.focal_loss.focal_loss` with the factors `scale` (N,) of the images' losses."""
    valid = (label >= 0)[..., None]  # (N, K, 1)
    positive = label[..., None] == torch.arange(1, logit.shape[2] + 1, device=label.device)  # (N, K, C)
    x = logit.to(torch.promote_types(logit.dtype, torch.float32))
    x = torch.where(valid, x, 0.0)  # else NaN at an ignored anchor would reach the gradient
    term = _term(torch.where(positive, -x, x), gamma)  # (N, K, C)
    term = torch.where(positive, alpha * term, (1 - alpha) * term)
    return (torch.where(valid, term, 0.0).sum(dim=(1, 2)) * scale).sum().to(x.dtype)


def focal_loss_levels(
    logit: Sequence[Tensor], label: Tensor, *, num_class: int, alpha: float, gamma: float, scale: Tensor
) -> Tensor:
    """Return `operator_cxx.focal_loss.focal_loss_levels` with the factors `scale` (N,) of the images' losses."""
    anchors = [level.flatten(2).unflatten(1, (-1, num_class)).transpose(2, 3).flatten(1, 2) for level in logit]
    return focal_loss(torch.cat(anchors, dim=1), label, alpha=alpha, gamma=gamma, scale=scale)  # (N, K, C)


def _term(z: Tensor, gamma: float) -> Tensor:
    """Return sigmoid(z)^gamma softplus(z), elementwise, for z = -logit at the positive class and z = logit elsewhere.

    The power is exp(gamma log sigmoid(z)), so that it and its gradient are accurate for every z and gamma >= 0.
    softplus is -log sigmoid(-z), which is accurate in every float type.
    """
    log_sigmoid = F.logsigmoid(z).clamp(min=-1e4)  # because 0 times infinity is not 0
    return torch.exp(gamma * log_sigmoid) * -F.logsigmoid(-z)
