"""Which anchor learns which box.

Shapes: N images, G boxes per image, K anchors of all levels.
Boxes are xyxy in input pixels with inclusive corners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from operator_cxx.box import encode_box, inclusive_area, inclusive_iou


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
    anchor's own best box, the first of equals: c learns the class of 8 and the place of 7.

    Args:
        gt_bbox: (N, G, 5) box and class from 1; rows whose class is below 1 are padding.
        im_info: (N, 3) height, width and scale of each image before padding.
        anchors: (K, 4); their type is the type that overlaps are computed in.
        pos_thr: at or above this IoU an anchor is foreground, of the first of its best boxes.
        neg_thr: below this IoU an anchor is background.
        min_pos_thr: a box forces no anchor when its best IoU is below this, or zero.
        allowed_border: anchors that reach further than this beyond the image are ignored and are no
            box's best.

    Returns:
        label (N, K): -1 ignored, 0 background, else the class; delta (N, K, 4): dx, dy, dw, dh, zero where
        label < 1.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", section 4, with the low-quality matches
    of Ren et al. 2015, "Faster R-CNN", section 3.1.2.
    """
    if gt_bbox.dim() != 3 or gt_bbox.shape[2] != 5 or im_info.shape != (gt_bbox.shape[0], 3):
        raise ValueError(
            "pyramid_anchor_target: expected gt_bbox (N, G, 5) and im_info (N, 3), "
            f"got {tuple(gt_bbox.shape)} and {tuple(im_info.shape)}"
        )
    if anchors.dim() != 2 or anchors.shape[1] != 4:
        raise ValueError(f"pyramid_anchor_target: expected anchors (K, 4), got {tuple(anchors.shape)}")
    gt_bbox, im_info = gt_bbox.to(anchors.dtype), im_info.to(anchors.dtype)
    anchors = anchors.t().contiguous().t()  # the loop over boxes reads whole columns
    area = inclusive_area(anchors)
    label = area.new_empty(len(gt_bbox), len(anchors))
    delta = anchors.new_zeros(len(gt_bbox), len(anchors), 4)
    rows: list[list[int]] = [[] for _ in gt_bbox]  # the real boxes of each image
    for n, g in (gt_bbox[:, :, 4] >= 1).nonzero().tolist():  # the only host sync of the batch
        rows[n].append(g)
    for n, row in enumerate(rows):
        inside = _inside(anchors, im_info[n], allowed_border)
        if not row:
            label[n] = torch.where(inside, 0.0, -1.0)
            continue
        box = gt_bbox[n, row]  # (G, 5)
        best, best_box, forced = _overlap(anchors, area, inside, box, min_pos_thr)
        label[n] = _label(best, box[best_box, 4], forced, inside, pos_thr=pos_thr, neg_thr=neg_thr)
        delta[n] = torch.where(label[n, :, None] >= 1, encode_box(anchors, box[best_box, :4]), 0.0)
    return label, delta


def _label(best: Tensor, best_cls: Tensor, forced: Tensor, inside: Tensor, *, pos_thr: float, neg_thr: float) -> Tensor:
    """(K,) labels from the best IoU, its box's class, the forced class or 0, and which anchors count; all (K,)."""
    label = torch.where(best < neg_thr, 0.0, -1.0)
    label = torch.where(forced > 0, forced, label)
    label = torch.where(best >= pos_thr, best_cls, label)
    return label.masked_fill(~inside, -1)


def _inside(anchors: Tensor, im_info: Tensor, allowed_border: float) -> Tensor:
    """(K,) bool: anchors that reach at most allowed_border beyond the image."""
    height, width = im_info[0], im_info[1]
    x1, y1, x2, y2 = anchors.unbind(1)
    low = (x1 >= -allowed_border) & (y1 >= -allowed_border)
    return low & (x2 < width + allowed_border) & (y2 < height + allowed_border)


def _overlap(
    anchors: Tensor, area: Tensor, inside: Tensor, box: Tensor, min_pos_thr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Best IoU (K,), its box (K,), and the class (K,) that a box forces on the anchor or 0.

    Box by box in order: memory is that of a few vectors of K, the first of equal overlaps stays the best, and
    the last box that forces an anchor gives its class.
    """
    best = torch.zeros_like(area)
    best_box = torch.zeros_like(area, dtype=torch.int64)
    forced = torch.zeros_like(area)
    for g, (xyxy, box_area, cls) in enumerate(zip(box[:, :4], inclusive_area(box[:, :4]), box[:, 4], strict=True)):
        iou = inclusive_iou(anchors, area, xyxy, box_area).mul_(inside)
        top = iou.max()
        top = torch.where((top > 0) & (top >= min_pos_thr), top, torch.inf)  # inf: it forces no anchor
        forced.masked_fill_(iou == top, cls)
        best_box.masked_fill_(iou > best, g)
        best = torch.maximum(best, iou)
    return best, best_box, forced
