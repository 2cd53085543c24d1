"""The vocabulary in torch: one function an operator, taking its inputs in order and its full attributes by name.

Loss operators return scalars: what MXNet defines by a gradient alone is given here the value that has this gradient.
N images, A anchors per cell, C channels or classes, H, W, K anchors of all levels, P cells of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from operator_cxx.anchor import base_anchors, grid_anchors
from operator_cxx.focal_loss import focal_loss as focal_loss_op
from operator_cxx.focal_loss import focal_loss_levels as focal_loss_levels_op
from operator_cxx.reference.smooth_l1 import smooth_l1 as smooth_l1_op
from operator_cxx.retina_decode import retina_decode
from operator_cxx.smooth_l1 import smooth_l1_loss
from symbol import shape_rules
from symbol.segment import recomputing


def convolution(
    data: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    dilate: tuple[int, ...],
    num_group: int,
    **_: Any,
) -> Tensor:
    """Computed in the data's dtype; the parameters stay as they are stored."""
    weight = weight.to(data.dtype)
    bias = None if bias is None else bias.to(data.dtype)
    return F.conv2d(data, weight, bias, stride or 1, pad or 0, dilate or 1, num_group)


def batch_norm(
    data: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_var: Tensor,
    training: bool,
    *,
    eps: float,
    momentum: float,
    fix_gamma: bool,
    use_global_stats: bool,
    **_: Any,
) -> Tensor:
    """Ioffe and Szegedy 2015. The moving variance takes the biased batch variance, as MXNet on a CPU does.

    A batch of no images has no statistics: the moving ones stay as they are. A recomputation does not move them again.
    """
    if fix_gamma:
        gamma = torch.ones_like(gamma)
    if not training or use_global_stats or data.shape[0] == 0:
        return F.batch_norm(data, moving_mean, moving_var, gamma, beta, False, 0.0, eps)
    out, mean, inverse_std = torch.native_batch_norm(data, gamma, beta, None, None, True, 0.0, eps)
    if recomputing():
        return out
    with torch.no_grad():
        variance = inverse_std.pow(-2) - eps
        moving_mean.mul_(momentum).add_(mean, alpha=1 - momentum)
        moving_var.mul_(momentum).add_(variance, alpha=1 - momentum)
    return out


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softrelu": F.softplus,
    "softsign": F.softsign,
}


def activation(data: Tensor, *, act_type: str) -> Tensor:
    return _ACTIVATIONS[act_type](data)


def pooling(
    data: Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    pool_type: str,
    global_pool: bool,
    pooling_convention: str,
    **_: Any,
) -> Tensor:
    if global_pool:
        return data.amax((2, 3), keepdim=True) if pool_type == "max" else data.mean((2, 3), keepdim=True)
    ceil = pooling_convention == "full"
    if pool_type == "max":
        return F.max_pool2d(data, kernel, stride or 1, pad or 0, ceil_mode=ceil)
    return F.avg_pool2d(data, kernel, stride or 1, pad or 0, ceil_mode=ceil)


def up_sampling(data: Tensor, *, scale: int, **_: Any) -> Tensor:
    return F.interpolate(data, scale_factor=float(scale), mode="nearest")


def slice_like(data: Tensor, like: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    for axis in axes or range(min(data.ndim, like.ndim)):
        # where nothing is cut off, a slice's gradient would still be a copy of the whole, in the default layout
        if data.shape[axis] != like.shape[axis]:
            data = data.narrow(axis, 0, like.shape[axis])
    return data


def slice_axis(data: Tensor, *, axis: int, begin: int, end: int | None) -> Tensor:
    size = data.shape[axis]
    start, stop, _ = slice(begin, end).indices(size)
    return data.narrow(axis, start, stop - start)


def _require_one_shape(lhs: Tensor, rhs: Tensor) -> None:
    """Raise ValueError for what torch would broadcast and MXNet's elementwise operators refuse."""
    if lhs.shape != rhs.shape:
        raise ValueError(
            f"expected two inputs of one shape, got {tuple(lhs.shape)} and {tuple(rhs.shape)}: "
            "use broadcast_mul or broadcast_div, or Reshape one of them"
        )


def elemwise_add(lhs: Tensor, rhs: Tensor) -> Tensor:
    _require_one_shape(lhs, rhs)
    return lhs + rhs


def elemwise_sub(lhs: Tensor, rhs: Tensor) -> Tensor:
    _require_one_shape(lhs, rhs)
    return lhs - rhs


def elemwise_mul(lhs: Tensor, rhs: Tensor) -> Tensor:
    _require_one_shape(lhs, rhs)
    return lhs * rhs


def broadcast_mul(lhs: Tensor, rhs: Tensor) -> Tensor:
    return lhs * rhs


def broadcast_div(lhs: Tensor, rhs: Tensor) -> Tensor:
    return lhs / rhs


def add_n(*terms: Tensor, **_: Any) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = elemwise_add(total, term)
    return total


def mul_scalar(data: Tensor, *, scalar: float, **_: Any) -> Tensor:
    return data * scalar


def reshape(data: Tensor, *, shape: tuple[int, ...], reverse: bool) -> Tensor:
    return data.reshape(shape_rules.reshape(tuple(data.shape), tuple(shape), reverse))


def transpose(data: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    return data.permute(tuple(axes) or tuple(reversed(range(data.ndim))))


def concat(*inputs: Tensor, dim: int, **_: Any) -> Tensor:
    return torch.cat(inputs, dim)


def cast(data: Tensor, *, dtype: str) -> Tensor:
    return data.to(getattr(torch, dtype))


def smooth_l1(data: Tensor, *, scalar: float, **_: Any) -> Tensor:
    return smooth_l1_op(data, scalar)


def _foreground_count(label: Tensor) -> Tensor:
    return (label >= 1).sum().to(torch.float32)


def make_loss(data: Tensor, *, grad_scale: float, normalization: str, valid_thresh: float) -> Tensor:
    """() from any shape: the sum, whose gradient is grad_scale everywhere."""
    total = data.sum() * grad_scale
    if normalization == "batch":  # MXNet counts rows: all dimensions but the last
        return total / max(1, math.prod(data.shape[:-1]))
    if normalization == "valid":
        return total / (data > valid_thresh).sum().clamp(min=1)
    return total


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
    """() from logits (N, K, C) and labels (N, K); "valid" divides by the foreground count + 1."""
    normalizer = _focal_normalizer(label, normalization)
    return focal_loss_op(data, label, alpha=alpha, gamma=gamma, normalizer=normalizer) * grad_scale


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
    """() as `focal_loss`, from the logits of every level (N, A*C, H, W)."""
    normalizer = _focal_normalizer(label, normalization)
    loss = focal_loss_levels_op(maps, label, num_class=num_class, alpha=alpha, gamma=gamma, normalizer=normalizer)
    return loss * grad_scale


def _focal_normalizer(label: Tensor, normalization: str) -> Tensor | None:
    """What divides the sum; None: the operator's own foreground count + 1."""
    if normalization == "valid":
        return None
    return torch.full((), float(label.shape[0] if normalization == "batch" else 1), device=label.device)


def smooth_l1_levels(target: Tensor, weight: Tensor, *maps: Tensor, scalar: float, **_: Any) -> Tensor:
    """() the sum of weight * smooth_l1(deltas - target), from the deltas of every level (N, 4A, H, W)."""
    return smooth_l1_loss(maps, target, weight, beta=1 / scalar**2)


def bbox_norm(data: Tensor, label: Tensor, *, normalization: str) -> Tensor:
    """The data as it is; its gradient divided by the foreground count + 1 ("valid") or by N ("batch")."""
    if normalization == "null":
        return data
    scaled = data / (data.shape[0] if normalization == "batch" else _foreground_count(label) + 1)
    return scaled + (data - scaled).detach()


def foreground_mean(loss: Tensor, label: Tensor) -> Tensor:
    return loss / (_foreground_count(label) + 1)


def gen_anchor(cls_prob: Tensor, base: Tensor, *, feature_stride: int, **_: Any) -> Tensor:
    """(H*W*A, 4) boxes xyxy, A fastest, from a map (N, A*C, H, W) and the base anchors (A, 4) on its device."""
    return grid_anchors(cls_prob.shape[2], cls_prob.shape[3], feature_stride, base, cls_prob.device)


def gen_anchor_base(*, scales: tuple[float, ...], ratios: tuple[float, ...], feature_stride: int) -> Tensor:
    """Base anchors (A, 4) float64: a constant of the module, so that no batch copies them to the device."""
    return torch.from_numpy(base_anchors(feature_stride, scales, ratios))


def gen_proposal_retina(
    cls_prob: Tensor,
    bbox_pred: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    *,
    num_anchors: int,
    rpn_pre_nms_top_n: int,
    thresh: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Boxes (N, top_n, 4) xyxy and scores (N, top_n, C + 1), one class of each row above 0; unused rows are 0."""
    bbox, score, cls = retina_decode(
        cls_prob,
        bbox_pred,
        im_info,
        anchors,
        pre_nms_top_n=rpn_pre_nms_top_n,
        thresh=thresh,
        num_anchors=num_anchors,
    )
    num_class = cls_prob.shape[1] // num_anchors + 1
    one_hot = score.new_zeros(*score.shape, num_class).scatter(2, cls.unsqueeze(2), score.unsqueeze(2))
    return bbox, one_hot
