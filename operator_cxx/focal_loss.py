"""Focal loss on sigmoid probabilities.

Shapes: N images, K anchors of all levels, C foreground classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(logit: Tensor, label: Tensor, *, alpha: float, gamma: float, normalizer: Tensor | None = None) -> Tensor:
    """The focal loss of a batch, a scalar. float16 and bfloat16 logits are computed in float32.

    With p = sigmoid(logit), class c of an anchor with label c adds -alpha (1 - p)^gamma log p, every other
    class adds -(1 - alpha) p^gamma log(1 - p), and an anchor with label -1 adds nothing.

    Args:
        logit: (N, K, C).
        label: (N, K): -1 ignored, 0 background, 1..C foreground.
        normalizer: a scalar, or (N,) one per image, that divides the sum; None: the number of labels >= 1,
            plus 1.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5.
    """
    if logit.dim() != 3 or label.shape != logit.shape[:2]:
        raise ValueError(
            f"focal_loss: expected logit (N, K, C) and label (N, K), got {tuple(logit.shape)} and {tuple(label.shape)}"
        )
    if gamma < 0:
        raise ValueError(f"focal_loss: expected gamma >= 0, got {gamma}")
    logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
    foreground = label >= 1
    positive = (label.long() - 1).clamp(min=0)[..., None]  # (N, K, 1) the channel of the label
    # With z = -logit at the positive class and z = logit elsewhere both cases are sigmoid(z)^gamma
    # softplus(z), up to their weight: one formula for all, and the weight of the few positives is corrected
    # afterwards.
    flipped = torch.where(foreground[..., None], -1.0, 1.0) * logit.gather(2, positive)
    term = _term(logit.scatter(2, positive, flipped), gamma)  # (N, K, C)
    per_anchor = (1 - alpha) * term.sum(dim=2)
    per_anchor = per_anchor + foreground * (2 * alpha - 1) * term.gather(2, positive)[..., 0]
    per_anchor = torch.where(label >= 0, per_anchor, 0.0)
    if normalizer is None:
        return per_anchor.sum() / (foreground.sum() + 1)
    return (per_anchor.sum(dim=1) / normalizer).sum()


def _term(z: Tensor, gamma: float) -> Tensor:
    """sigmoid(z)^gamma softplus(z), elementwise.

    The power is taken as exp(gamma log sigmoid(z)), so that it and its gradient are right for every z and
    gamma >= 0.
    """
    return torch.exp(gamma * F.logsigmoid(z)) * F.softplus(z)
