"""Greedy non-maximum suppression per class.

Shapes: M boxes. Boxes are xyxy in input pixels with inclusive corners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from operator_cxx.box import inclusive_area, inclusive_iou

_BLOCK = 256  # boxes decided at once; a (block, block) table of overlaps is held


def multiclass_nms(bbox: Tensor, score: Tensor, cls: Tensor, *, thr: float, max_det: int) -> Tensor:
    """Indices (kept,) int64 of the boxes that stay, by falling score, at most max_det.

    A box goes when its inclusive IoU with a kept box of its own class and of a higher score is above thr. Of
    equal scores the lower index comes first. Boxes of every class are decided alike, class 0 too: leave out
    padding rows before.

    Args:
        bbox: (M, 4), on any scale and of any type. score: (M,). cls: (M,).
    """
    M = len(bbox)
    if bbox.shape != (M, 4) or score.shape != (M,) or cls.shape != (M,):
        raise ValueError(
            "multiclass_nms: expected bbox (M, 4), score (M,) and cls (M,), "
            f"got {tuple(bbox.shape)}, {tuple(score.shape)} and {tuple(cls.shape)}"
        )
    order = torch.sort(score, descending=True, stable=True).indices
    bbox, cls = bbox[order], cls[order]
    area = inclusive_area(bbox)

    def suppress(i: Tensor, j: Tensor) -> Tensor:
        """(len(i), len(j)) bool: would box i, if kept, remove box j?"""
        iou = inclusive_iou(bbox[i][:, None], area[i][:, None], bbox[j], area[j])
        return (iou > thr) & (cls[i][:, None] == cls[j])

    position = torch.arange(M, device=bbox.device)
    kept = position[:0]
    for block in position.split(_BLOCK):
        if len(kept) >= max_det:  # the rest has lower scores
            break
        alive = ~suppress(kept, block).any(dim=0)
        kept = torch.cat([kept, block[_greedy(suppress(block, block).triu(1), alive)]])
    return order[kept[:max_det]]


def _greedy(suppress: Tensor, alive: Tensor) -> Tensor:
    """(B,) bool: the boxes kept of those alive, where suppress (B, B) holds True at [i, j] only for i < j.

    Repeats "a box stays if no box that stays removes it" until nothing changes. The first box is right after
    one round and every round settles at least one more, so it ends at the one greedy answer, mostly after two
    to five rounds.
    """
    table = suppress.float()  # a product with a vector is the quickest "any" over columns
    keep = alive
    while True:
        settled = alive & (keep.float() @ table == 0)
        if torch.equal(settled, keep):
            return keep
        keep = settled
