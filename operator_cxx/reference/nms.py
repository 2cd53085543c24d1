"""Greedy non-maximum suppression per class, one image after another.

Shapes: N images, M boxes of an image, D boxes kept at most. Boxes are xyxy in input pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from operator_cxx.reference.box import inclusive_area, inclusive_iou

_BLOCK = 256  # boxes decided at once; a (block, block) table of overlaps is held


def nms(
    bbox: Tensor, score: Tensor, cls: Tensor, *, thr: float, max_det: int, min_score: float, offset: int
) -> tuple[Tensor, Tensor]:
    """`operator_cxx.nms.nms`; offset: 1 for inclusive corners, 0 for exclusive."""
    kept = [_hard(*image, thr, max_det, min_score, offset) for image in zip(bbox, score, cls, strict=True)]
    return _padded(kept, score, max_det)


def soft_nms(
    bbox: Tensor,
    score: Tensor,
    cls: Tensor,
    *,
    decay: Callable[[Tensor], Tensor],
    max_det: int,
    min_score: float,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """`operator_cxx.nms.soft_nms` with decay, what an IoU multiplies a score by."""
    kept = [_soft(*image, decay, max_det, min_score, offset) for image in zip(bbox, score, cls, strict=True)]
    return _padded(kept, score, max_det)


def linear_decay(thr: float) -> Callable[[Tensor], Tensor]:
    """1 - IoU where the IoU is above thr."""
    return lambda iou: torch.where(iou > thr, 1 - iou, 1)


def gaussian_decay(sigma: float) -> Callable[[Tensor], Tensor]:
    """exp(-IoU^2 / sigma), 1 where the IoU is NaN."""
    return lambda iou: torch.where(iou.isnan(), 1, torch.exp(-(iou * iou) / sigma))


def _hard(
    bbox: Tensor, score: Tensor, cls: Tensor, thr: float, max_det: int, min_score: float, offset: int
) -> tuple[Tensor, Tensor]:
    """Indices and scores of the boxes of one image that stay, best first."""
    candidate = (score > min_score).nonzero()[:, 0]
    order = candidate[torch.sort(score[candidate], descending=True, stable=True).indices]
    bbox, cls = bbox[order], cls[order]
    area = inclusive_area(bbox, offset)

    def suppress(i: Tensor, j: Tensor) -> Tensor:
        """(len(i), len(j)) bool: would box i, if kept, remove box j?"""
        iou = inclusive_iou(bbox[i][:, None], area[i][:, None], bbox[j], area[j], offset)
        return (iou > thr) & (cls[i][:, None] == cls[j])

    position = torch.arange(len(order), device=bbox.device)
    kept = position[:0]
    for block in position.split(_BLOCK):
        if len(kept) >= max_det:  # the rest has lower scores
            break
        alive = ~suppress(kept, block).any(dim=0)
        kept = torch.cat([kept, block[_greedy(suppress(block, block).triu(1), alive)]])
    index = order[kept[:max_det]]
    return index, score[index]


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


def _soft(
    bbox: Tensor,
    score: Tensor,
    cls: Tensor,
    decay: Callable[[Tensor], Tensor],
    max_det: int,
    min_score: float,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Indices and last scores of the boxes of one image that stay, best first."""
    area = inclusive_area(bbox, offset)
    current = score.to(torch.promote_types(score.dtype, torch.float32))
    alive = current > min_score
    index: list[Tensor] = []
    kept: list[Tensor] = []
    while len(index) < max_det and alive.any():
        best = current.where(alive, -torch.inf).argmax()  # the first of equals
        index.append(best)
        kept.append(current[best])
        iou = inclusive_iou(bbox[best], area[best], bbox, area, offset)
        current = torch.where(cls == cls[best], current * decay(iou), current)
        alive = alive & (current > min_score)
        alive[best] = False
    if not index:
        return cls.new_empty(0, dtype=torch.int64), score[:0]
    return torch.stack(index), torch.stack(kept).to(score.dtype)


def _padded(kept: list[tuple[Tensor, Tensor]], score: Tensor, max_det: int) -> tuple[Tensor, Tensor]:
    """Of every image: indices (N, D), -1 beyond the kept, and scores (N, D), 0 beyond."""
    index = torch.full((len(kept), max_det), -1, device=score.device)
    kept_score = score.new_zeros(len(kept), max_det)
    for n, (its_index, its_score) in enumerate(kept):
        index[n, : len(its_index)] = its_index
        kept_score[n, : len(its_score)] = its_score
    return index, kept_score
