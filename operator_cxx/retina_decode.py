"""Decoding of one level: from the outputs of the head to the best boxes.

Shapes: N images, A anchors per cell, C foreground classes, H x W cells, T = pre_nms_top_n boxes kept.
Boxes are xyxy in input pixels with inclusive corners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from operator_cxx import library
from operator_cxx.reference import retina_decode as reference

_COMPILED = (torch.float32, torch.float16, torch.bfloat16)


def retina_decode(
    cls_prob: Tensor,
    bbox_pred: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    *,
    pre_nms_top_n: int,
    thresh: float,
    num_anchors: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best (anchor, class) pairs of one level and their boxes.

    The shapes of the results do not depend on values, so graphs with this operator can be traced. There are no
    gradients.

    Args:
        cls_prob: (N, A*C, H, W) probabilities, anchor-major, then class. They are compared as float32.
        bbox_pred: (N, 4A, H, W) deltas, anchor-major, then dx, dy, dw, dh. A NaN delta gives NaN coordinates.
        im_info: (N, 3) height, width and scale of each image before padding; boxes are clipped to it.
        anchors: (H*W*A, 4) in the order of `operator_cxx.anchor.grid_anchors`.
        pre_nms_top_n: T, the maximum number of pairs.
        thresh: candidates are pairs with a probability above this; at least 0. NaN is not a candidate.
        num_anchors: A.

    Returns:
        bbox (N, T, 4) float32 (float64 if bbox_pred is), score (N, T) float32 and cls (N, T) int64 from 1, in
        descending order of score, equal scores in the order (A, C, H, W). Rows beyond the candidates are zero,
        including their class.

    Raises ValueError for inconsistent shapes, types or devices and for invalid settings. Types other than float32,
    float16 and bfloat16 are computed in plain torch.
    """
    _check(cls_prob, bbox_pred, im_info, anchors, pre_nms_top_n, thresh, num_anchors)
    cls_prob, bbox_pred = cls_prob.detach(), bbox_pred.detach()
    if library.serves(cls_prob, *_COMPILED) and library.serves(bbox_pred, *_COMPILED):
        return _op(cls_prob, bbox_pred, im_info.detach(), anchors.detach(), pre_nms_top_n, thresh, num_anchors)
    return reference.retina_decode(
        cls_prob,
        bbox_pred,
        im_info,
        anchors,
        pre_nms_top_n=pre_nms_top_n,
        thresh=thresh,
        num_anchors=num_anchors,
    )


@torch.library.custom_op("necklace::retina_decode", mutates_args=())
def _op(
    cls_prob: Tensor,
    bbox_pred: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    pre_nms_top_n: int,
    thresh: float,
    num_anchors: int,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = library.loaded[cls_prob.device.type]
    prob, delta = cls_prob.flatten(2), bbox_pred.flatten(2)  # (N, A*C, H*W), (N, 4A, H*W)
    N, channel, cells = prob.shape
    sizes = (N, num_anchors, channel // num_anchors, cells, pre_nms_top_n)
    bbox, score, cls = answer = _answer(cls_prob, pre_nms_top_n)
    kernels.run(
        "retina_decode",
        prob,  # the device
        prob,
        library.DTYPES[prob.dtype],
        prob.stride(),
        delta,
        library.DTYPES[delta.dtype],
        delta.stride(),
        anchors.float().contiguous(),
        im_info.float().contiguous(),
        *sizes,
        thresh,
        bbox,
        score,
        cls,
        kernels.workspace("retina_decode", prob, *sizes),
    )
    return answer


@_op.register_fake
def _(
    cls_prob: Tensor,
    bbox_pred: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    pre_nms_top_n: int,
    thresh: float,
    num_anchors: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _answer(cls_prob, pre_nms_top_n)


def _answer(cls_prob: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialised bbox, score and cls with `count` rows per image."""
    N = cls_prob.shape[0]
    return (
        cls_prob.new_empty((N, count, 4), dtype=torch.float32),
        cls_prob.new_empty((N, count), dtype=torch.float32),
        cls_prob.new_empty((N, count), dtype=torch.int64),
    )


def _check(
    cls_prob: Tensor,
    bbox_pred: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    pre_nms_top_n: int,
    thresh: float,
    num_anchors: int,
) -> None:
    """Raise ValueError unless shapes, types, devices and settings are consistent."""
    if cls_prob.dim() != 4 or num_anchors < 1 or cls_prob.shape[1] % num_anchors:
        raise ValueError(
            f"retina_decode: expected cls_prob (N, A*C, H, W) with A = {num_anchors}, got {tuple(cls_prob.shape)}"
        )
    N, channel, H, W = cls_prob.shape
    expected = {
        "bbox_pred": (bbox_pred, (N, 4 * num_anchors, H, W)),
        "im_info": (im_info, (N, 3)),
        "anchors": (anchors, (H * W * num_anchors, 4)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"retina_decode: expected {name} {shape}, got {tuple(tensor.shape)}")
    if pre_nms_top_n < 1 or not thresh >= 0:
        raise ValueError(
            f"retina_decode: expected pre_nms_top_n >= 1 and thresh >= 0, got {pre_nms_top_n} and {thresh}"
        )
    if channel * H * W >= 2**32:  # the index is the low half of a 64-bit key
        raise ValueError(
            f"retina_decode: expected fewer than 2^32 probabilities per image, got {tuple(cls_prob.shape)}: "
            "fewer classes, anchors or cells"
        )
    if not (cls_prob.is_floating_point() and bbox_pred.is_floating_point()):
        raise ValueError(
            "retina_decode: expected cls_prob and bbox_pred of floating-point types, "
            f"got {cls_prob.dtype} and {bbox_pred.dtype}"
        )
    devices = {str(tensor.device) for tensor in (cls_prob, bbox_pred, im_info, anchors)}
    if len(devices) != 1:
        raise ValueError(f"retina_decode: expected all tensors on one device, got {', '.join(sorted(devices))}")
