"""Focal loss on sigmoid probabilities.

Shapes: N images, A anchors per cell, H x W cells of a level, P = H * W, C foreground classes, K anchors of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from operator_cxx import library
from operator_cxx.levels import gradients, image_scale, require_alike, scaled
from operator_cxx.reference import focal_loss as reference


def focal_loss(logit: Tensor, label: Tensor, *, alpha: float, gamma: float, normalizer: Tensor | None = None) -> Tensor:
    """Return the focal loss of a batch, a scalar. float16 and bfloat16 logits are computed in float32.

    With p = sigmoid(logit), class c of an anchor with label c adds -alpha (1 - p)^gamma log p, every other
    class adds -(1 - alpha) p^gamma log(1 - p), and an anchor with label -1 adds nothing, whatever its logits are.
    Only the logits receive gradients. There is no second derivative.

    Args:
        logit: (N, K, C), in any memory layout.
        label: (N, K): -1 ignored, 0 background, 1..C foreground.
        normalizer: a scalar, or (N,) one per image, that divides the sum; None: the number of labels >= 1,
            plus 1.

    Raises ValueError for inconsistent shapes, types or devices and for invalid settings.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5.
    """
    if logit.dim() != 3 or label.shape != logit.shape[:2]:
        raise ValueError(
            f"focal_loss: expected logit (N, K, C) and label (N, K), got {tuple(logit.shape)} and {tuple(label.shape)}"
        )
    scale = _scale("focal_loss", [logit], label, gamma, normalizer)
    if not library.serves(logit):
        return reference.focal_loss(logit, label, alpha=alpha, gamma=gamma, scale=scale)
    return _loss([logit.transpose(1, 2).unsqueeze(1)], label, scale, alpha, gamma)  # (N, 1, C, K)


def focal_loss_levels(
    logit: Sequence[Tensor],
    label: Tensor,
    *,
    num_class: int,
    alpha: float,
    gamma: float,
    normalizer: Tensor | None = None,
) -> Tensor:
    """Return `focal_loss` of the maps of all levels, without transposing or concatenating them.

    Args:
        logit: (N, A*C, H, W) or (N, A*C, H*W) per level, all of the same floating-point type; contiguous and
            channels-last maps are read in place, others are copied.
        label: (N, sum of A*H*W), the anchors of a level in the order (A, H, W), levels in the order of `logit`.
        num_class: C.

    The other arguments, the result and the errors are those of `focal_loss`.
    """
    if num_class < 1:
        raise ValueError(f"focal_loss_levels: expected num_class >= 1, got {num_class}")
    shapes = [tuple(level.shape) for level in logit]
    fits = all(len(s) in (3, 4) and s[0] == label.shape[0] and s[1] % num_class == 0 for s in shapes)
    anchors = sum(math.prod(s[1:]) for s in shapes) // num_class
    if label.dim() != 2 or not fits or label.shape[1] != anchors:
        raise ValueError(
            f"focal_loss_levels: expected levels (N, A*{num_class}, H, W) and label (N, sum of A*H*W), got levels "
            f"{shapes} and label {tuple(label.shape)}"
        )
    scale = _scale("focal_loss_levels", logit, label, gamma, normalizer)
    if not library.serves(logit[0]):
        return reference.focal_loss_levels(logit, label, num_class=num_class, alpha=alpha, gamma=gamma, scale=scale)
    maps = [level.flatten(2).unflatten(1, (-1, num_class)) for level in logit]  # (N, A, C, P)
    return _loss(maps, label, scale, alpha, gamma)


def _scale(operator: str, logit: Sequence[Tensor], label: Tensor, gamma: float, normalizer: Tensor | None) -> Tensor:
    """Check the arguments. Return `image_scale` with the default normalizer of this loss."""
    if not gamma >= 0:
        raise ValueError(f"{operator}: expected gamma >= 0, got {gamma}")
    require_alike(operator, logit, label=label)
    if normalizer is None:
        normalizer = torch.count_nonzero(label >= 1) + 1  # four times as fast as a sum of bool
    return image_scale(operator, label, normalizer)


def _loss(logit: Sequence[Tensor], label: Tensor, scale: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the loss of levels (N, A, C, P), computed by the kernels."""
    # On a CPU, the gradient is computed with the loss, in half the time of two passes, and scaled by the gradient of
    # the loss later. On a GPU that scaling would take longer than a second pass, and float16 gradients would underflow
    # before a loss scale is applied.
    wanted = torch.is_grad_enabled() and any(level.requires_grad for level in logit)
    with_grad = wanted and logit[0].device.type == "cpu" and logit[0].dtype != torch.float16
    return _op(list(logit), label.to(torch.float32), scale, alpha, gamma, with_grad)[0]


@torch.library.custom_op("necklace::focal_loss", mutates_args=())
def _op(
    logit: Sequence[Tensor], label: Tensor, scale: Tensor, alpha: float, gamma: float, with_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of levels (N, A, C, P), and the gradient of every level or an empty list."""
    kernels = library.loaded[label.device.type]
    label = label.contiguous()
    loss = torch.zeros((), dtype=torch.float64, device=label.device)
    grads = gradients(logit, with_grad)
    first = 0  # anchor of the level
    for i, level in enumerate(logit):
        N, A, C, P = level.shape
        grad = grads[i] if grads else None
        kernels.run(
            "focal_loss",
            level,  # the device
            level,
            grad,
            library.DTYPES[level.dtype],
            *(N, A, P, C),
            level.stride(),
            None if grad is None else grad.stride(),
            label[:, first:],
            label.shape[1],
            scale,
            alpha,
            gamma,
            loss,
            kernels.workspace("focal_loss", level, N, A, P, C),
        )
        first += A * P
    return loss.to(torch.promote_types(logit[0].dtype, torch.float32)), grads


@_op.register_fake
def _(
    logit: Sequence[Tensor], label: Tensor, scale: Tensor, alpha: float, gamma: float, with_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    loss = label.new_empty((), dtype=torch.promote_types(logit[0].dtype, torch.float32))
    return loss, gradients(logit, with_grad)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    logit, label, scale, ctx.alpha, ctx.gamma, ctx.with_grad = inputs
    ctx.levels = len(logit)
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)  # else backward would receive zeros for the gradients, of the same size
    ctx.save_for_backward(*(output[1] if ctx.with_grad else [label, scale, *logit]))


def _backward(ctx: Any, factor: Tensor | None, _: Any) -> Any:
    grad: Sequence[Tensor | None]
    if factor is None:
        grad = [None] * ctx.levels
    elif ctx.with_grad:
        grad = scaled(ctx.saved_tensors, factor)
    else:
        label, scale, *logit = ctx.saved_tensors
        grad = _op(logit, label, scale * factor, ctx.alpha, ctx.gamma, True)[1]
    return grad, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_keep)
