"""Which anchor learns which box.

Shapes: N images, G boxes per image, K anchors of all levels.
Boxes are xyxy in input pixels with inclusive corners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from operator_cxx import library
from operator_cxx.reference import anchor_target as reference


def pyramid_anchor_target(
    gt_bbox: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    *,
    pos_thr: float,
    neg_thr: float,
    min_pos_thr: float,
    allowed_border: float,
) -> tuple[Tensor, Tensor]:
    """The class that each anchor is trained on, and the deltas to its box.

    An anchor is foreground of its best box at or above pos_thr, background below neg_thr, and ignored between
    the two. Besides, every anchor that ties for the best IoU of a box becomes foreground of that box, however
    low, unless pos_thr already gave it a class. With pos_thr 0.5, neg_thr 0.4 and boxes of classes 7, 8, 9:

        anchor   IoU with 7, 8, 9     label
        a        0.70   0.20   0.60     7     its best box; it is the best for 9 too, but above pos_thr
        b        0.45   0.10   0.00    -1     between the thresholds
        c        0.30   0.25   0.10     8     the best that there is for 8, though it overlaps 7 more
        d        0.20   0.10   0.30     0     below neg_thr; a is better for 9

    Of several boxes that force one anchor the last gives the class. The deltas are always those to the
    anchor's own best box, the first of equals: c learns the class of 8 and the place of 7. There are no gradients.

    A box that has NaN forces no anchor, and makes those that no other box forces ignored.

    Args:
        gt_bbox: (N, G, 5) box and class from 1; rows whose class is below 1 are padding.
        im_info: (N, 3) height, width and scale of each image before padding.
        anchors: (K, 4) of a floating-point type, in which overlaps are computed; the kernels take float32.
        pos_thr: at or above this IoU an anchor is foreground, of the first of its best boxes.
        neg_thr: below this IoU an anchor is background.
        min_pos_thr: a box forces no anchor when its best IoU is below this, or zero.
        allowed_border: anchors that reach further than this beyond the image are ignored and are no
            box's best.

    Returns:
        label (N, K): -1 ignored, 0 background, else the class; delta (N, K, 4): dx, dy, dw, dh, zero where
        label < 1. Both are of the anchors' type.

    Raises ValueError for shapes, types or devices that do not fit.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", section 4, with the low-quality matches
    of Ren et al. 2015, "Faster R-CNN", section 3.1.2.
    """
    _check(gt_bbox, im_info, anchors)
    gt_bbox, im_info = gt_bbox.detach().to(anchors.dtype), im_info.detach().to(anchors.dtype)
    assign = _op if library.serves(anchors, torch.float32) else reference.pyramid_anchor_target
    return assign(gt_bbox, im_info, anchors.detach(), pos_thr, neg_thr, min_pos_thr, allowed_border)


@torch.library.custom_op("necklace::anchor_target", mutates_args=())
def _op(
    gt_bbox: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    pos_thr: float,
    neg_thr: float,
    min_pos_thr: float,
    allowed_border: float,
) -> tuple[Tensor, Tensor]:
    kernels = library.loaded[anchors.device.type]
    sizes = (gt_bbox.shape[0], gt_bbox.shape[1], anchors.shape[0])  # N, G, K
    label, delta = _empty(gt_bbox, anchors)
    kernels.run(
        "anchor_target",
        anchors,  # works where this is
        gt_bbox.contiguous(),
        im_info.contiguous(),
        anchors.contiguous(),
        *sizes,
        pos_thr,
        neg_thr,
        min_pos_thr,
        allowed_border,
        label,
        delta,
        kernels.workspace("anchor_target", anchors, *sizes),
    )
    return label, delta


@_op.register_fake
def _(
    gt_bbox: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    pos_thr: float,
    neg_thr: float,
    min_pos_thr: float,
    allowed_border: float,
) -> tuple[Tensor, Tensor]:
    return _empty(gt_bbox, anchors)


def _empty(gt_bbox: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised label (N, K) and delta (N, K, 4)."""
    N, K = gt_bbox.shape[0], anchors.shape[0]
    return anchors.new_empty(N, K), anchors.new_empty(N, K, 4)


def _check(gt_bbox: Tensor, im_info: Tensor, anchors: Tensor) -> None:
    """Raise ValueError unless shapes, types and devices fit."""
    if gt_bbox.dim() != 3 or gt_bbox.shape[2] != 5 or im_info.shape != (gt_bbox.shape[0], 3):
        raise ValueError(
            "pyramid_anchor_target: expected gt_bbox (N, G, 5) and im_info (N, 3), "
            f"got {tuple(gt_bbox.shape)} and {tuple(im_info.shape)}"
        )
    if anchors.dim() != 2 or anchors.shape[1] != 4:
        raise ValueError(f"pyramid_anchor_target: expected anchors (K, 4), got {tuple(anchors.shape)}")
    if not anchors.is_floating_point():
        raise ValueError(f"pyramid_anchor_target: expected anchors of a floating-point type, got {anchors.dtype}")
    devices = {"gt_bbox": gt_bbox.device, "im_info": im_info.device, "anchors": anchors.device}
    if len(set(devices.values())) != 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"pyramid_anchor_target: expected all tensors on one device, got {found}")
