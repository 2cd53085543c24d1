"""Anchor targets: the class and the box that each anchor is trained on.

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
    """Return the class that each anchor is trained on, and the deltas to its box.

    An anchor is foreground with the class of its best box if their IoU is at least pos_thr, background if it is below
    neg_thr, and ignored in between. In addition, a box forces every anchor that has the box's best IoU: the anchor
    becomes foreground with the box's class, however low the IoU is, unless its own best IoU is at least pos_thr. With
    pos_thr 0.5, neg_thr 0.4 and boxes of classes 7, 8, 9:

        anchor   IoU with 7, 8, 9     label
        a        0.70   0.20   0.60     7     its best box; 9 does not force it, because 0.70 >= pos_thr
        b        0.45   0.10   0.00    -1     between the thresholds
        c        0.30   0.25   0.10     8     forced by 8, although its IoU with 7 is higher
        d        0.20   0.10   0.30     0     below neg_thr; the best anchor of 9 is a

    If several boxes force an anchor, the last one's class is taken. The deltas are always those to the anchor's own
    best box, the first of equals: c has the class of 8 and the deltas to 7. There are no gradients.

    A box with a NaN coordinate forces no anchor, and all anchors that no other box forces are ignored.

    Args:
        gt_bbox: (N, G, 5) box and class from 1; rows whose class is below 1 are padding.
        im_info: (N, 3) height, width and scale of each image before padding.
        anchors: (K, 4) of a floating-point type, in which IoUs are computed; the kernels support float32.
        pos_thr: least IoU of a foreground anchor with its best box.
        neg_thr: an anchor is background if its best IoU is below this.
        min_pos_thr: a box forces no anchor if its best IoU is below this, or zero.
        allowed_border: anchors that extend further than this beyond the image are ignored, and no box forces them.

    Returns:
        label (N, K): -1 ignored, 0 background, else the class; delta (N, K, 4): dx, dy, dw, dh, zero where
        label < 1. Both are of the anchors' type.

    Raises ValueError for inconsistent shapes, types or devices.

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
        anchors,  # the device
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
    """Return uninitialised label (N, K) and delta (N, K, 4)."""
    N, K = gt_bbox.shape[0], anchors.shape[0]
    return anchors.new_empty(N, K), anchors.new_empty(N, K, 4)


def _check(gt_bbox: Tensor, im_info: Tensor, anchors: Tensor) -> None:
    """Raise ValueError unless shapes, types and devices are consistent."""
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
