"""Anchor targets: the class and the box that each anchor is trained on.

Shapes: N images, G boxes per image, K anchors of all levels.
Boxes are xyxy in input pixels with inclusive corners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from operator_cxx.reference.box import encode_box, inclusive_area, inclusive_iou


def pyramid_anchor_target(
    gt_bbox: Tensor,
    im_info: Tensor,
    anchors: Tensor,
    pos_thr: float,
    neg_thr: float,
    min_pos_thr: float,
    allowed_border: float,
) -> tuple[Tensor, Tensor]:
    """Return `operator_cxx.anchor_target.pyramid_anchor_target` for tensors of the same floating-point type."""
    anchors = anchors.t().contiguous().t()  # column by column, for the loop over boxes
    area = inclusive_area(anchors)
    label = area.new_empty(len(gt_bbox), len(anchors))
    delta = anchors.new_zeros(len(gt_bbox), len(anchors), 4)
    if len(anchors) == 0:
        return label, delta
    rows: list[list[int]] = [[] for _ in gt_bbox]  # boxes of each image without padding
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
    """Return labels by best IoU, the class of its box, the forced class or 0, and whether it is inside; all (K,)."""
    label = torch.where(best < neg_thr, 0.0, -1.0)
    label = torch.where(forced > 0, forced, label)
    label = torch.where(best >= pos_thr, best_cls, label)
    return label.masked_fill(~inside, -1)


def _inside(anchors: Tensor, im_info: Tensor, allowed_border: float) -> Tensor:
    """Return bool (K,): True for anchors that extend at most allowed_border beyond the image."""
    height, width = im_info[0], im_info[1]
    x1, y1, x2, y2 = anchors.unbind(1)
    low = (x1 >= -allowed_border) & (y1 >= -allowed_border)
    return low & (x2 < width + allowed_border) & (y2 < height + allowed_border)


def _overlap(
    anchors: Tensor, area: Tensor, inside: Tensor, box: Tensor, min_pos_thr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best IoU (K,), the index of its box (K,), and the class (K,) that a box forces or 0.

    Boxes are visited in order: the memory is that of a few vectors (K,), the first of equal IoUs is the best, and the
    last box that forces an anchor determines its class.
    """
    best = torch.zeros_like(area)
    best_box = torch.zeros_like(area, dtype=torch.int64)
    forced = torch.zeros_like(area)
    for g, (xyxy, box_area, cls) in enumerate(zip(box[:, :4], inclusive_area(box[:, :4]), box[:, 4], strict=True)):
        iou = inclusive_iou(anchors, area, xyxy, box_area).mul_(inside)
        top = iou.max()
        top = torch.where((top > 0) & (top >= min_pos_thr), top, torch.inf)  # inf: the box forces no anchor
        forced.masked_fill_(iou == top, cls)
        best_box.masked_fill_(iou > best, g)
        best = torch.maximum(best, iou)
    return best, best_box, forced
