"""Weighted smooth L1 of box deltas.

Shapes: N images, R = 4A rows (anchor-major, then dx, dy, dw, dh), H x W cells of a level, P cells of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from operator_cxx import library
from operator_cxx.levels import gradients, image_scale, require_alike, scaled
from operator_cxx.reference import smooth_l1 as reference


def smooth_l1_loss(
    delta: Sequence[Tensor], target: Tensor, weight: Tensor, *, beta: float, normalizer: Tensor | None = None
) -> Tensor:
    """Return the sum of weight * smooth_l1(delta - target) over all levels, a scalar.

    smooth_l1(x) is x^2 / (2 beta) where |x| < beta, else |x| - beta / 2. Only the deltas receive gradients.

    Args:
        delta: (N, R, H, W) per level, all of the same floating-point type; float16 and bfloat16 are computed in
            float32.
        target, weight: (N, R, P), levels in the same order.
        normalizer: a scalar, or (N,) one per image, that divides the sum; None: 1.

    Raises ValueError for inconsistent shapes, types or devices.

    Source: Girshick 2015, "Fast R-CNN", equation 3.
    """
    _check(delta, target, weight, beta)
    scale = image_scale("smooth_l1_loss", target, normalizer)
    if not all(library.serves(level) for level in delta):
        return reference.smooth_l1_loss(delta, target, weight, beta=beta, scale=scale)
    dtype = torch.promote_types(delta[0].dtype, torch.float32)
    with_grad = torch.is_grad_enabled() and any(level.requires_grad for level in delta)
    maps = [level.flatten(2) for level in delta]  # (N, R, H*W)
    return _op(maps, target.to(dtype), weight.to(dtype), scale, beta, with_grad)[0]


@torch.library.custom_op("necklace::smooth_l1_loss", mutates_args=())
def _op(
    delta: Sequence[Tensor], target: Tensor, weight: Tensor, scale: Tensor, beta: float, with_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of levels (N, R, H*W), and the gradient of every level or an empty list."""
    kernels = library.loaded[target.device.type]
    target, weight = target.contiguous(), weight.contiguous()
    _, R, P = target.shape
    loss = torch.zeros((), dtype=torch.float64, device=target.device)
    grads = gradients(delta, with_grad)
    first = 0  # cell of the level
    for i, level in enumerate(delta):
        grad = grads[i] if grads else None
        kernels.run(
            "smooth_l1",
            level,  # the device
            level,
            grad,
            library.DTYPES[level.dtype],
            *level.shape,
            level.stride(),
            None if grad is None else grad.stride(),
            target[:, :, first:],
            weight[:, :, first:],
            (R * P, P),
            scale,
            beta,
            loss,
            kernels.workspace("smooth_l1", level, *level.shape),
        )
        first += level.shape[2]
    return loss.to(target.dtype), grads


@_op.register_fake
def _(
    delta: Sequence[Tensor], target: Tensor, weight: Tensor, scale: Tensor, beta: float, with_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    return target.new_empty(()), gradients(delta, with_grad)


def _keep_gradient(ctx: Any, inputs: Any, output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.levels = len(inputs[0])
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)  # else backward would receive zeros for the gradients, of the same size
    ctx.save_for_backward(*output[1])


def _backward(ctx: Any, factor: Tensor | None, _: Any) -> Any:
    grad = [None] * ctx.levels if factor is None else scaled(ctx.saved_tensors, factor)
    return grad, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_keep_gradient)


def _check(delta: Sequence[Tensor], target: Tensor, weight: Tensor, beta: float) -> None:
    """Raise ValueError unless shapes, types, devices and settings are consistent."""
    shapes = [tuple(level.shape) for level in delta]
    N, R, P = target.shape if target.dim() == 3 else (-1, -1, -1)
    fits = all(len(shape) in (3, 4) and shape[:2] == (N, R) for shape in shapes)
    if not fits or weight.shape != target.shape or sum(math.prod(shape[2:]) for shape in shapes) != P:
        raise ValueError(
            "smooth_l1_loss: expected levels (N, R, H, W), target and weight (N, R, sum of H*W), got levels "
            f"{shapes}, target {tuple(target.shape)} and weight {tuple(weight.shape)}"
        )
    if not beta > 0:
        raise ValueError(f"smooth_l1_loss: expected beta > 0, got {beta}")
    require_alike("smooth_l1_loss", delta, target=target, weight=weight)
