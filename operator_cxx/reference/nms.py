"""Greedy non-maximum suppression per class, one image after another.

Shapes: N images, M boxes per image, D = max_det. Boxes are xyxy in input pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from operator_cxx.reference.box import inclusive_area, inclusive_iou

_BLOCK = 256  # boxes decided at once, with a (block, block) table of overlaps


def nms(
    bbox: Tensor, score: Tensor, cls: Tensor, *, thr: float, max_det: int, min_score: float, offset: int
) -> tuple[Tensor, Tensor]:
    """Return `operator_cxx.nms.nms`. offset: 1 for inclusive corners, 0 for exclusive."""
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
    """Return `operator_cxx.nms.soft_nms`. decay: the factor of a score as a function of the IoU."""
    kept = [_soft(*image, decay, max_det, min_score, offset) for image in zip(bbox, score, cls, strict=True)]
    return _padded(kept, score, max_det)


def linear_decay(thr: float) -> Callable[[Tensor], Tensor]:
    """Return the decay 1 - IoU where the IoU is above thr, else 1."""
    return lambda iou: torch.where(iou > thr, 1 - iou, 1)


def gaussian_decay(sigma: float) -> Callable[[Tensor], Tensor]:
    """Return the decay exp(-IoU^2 / sigma), 1 where the IoU is NaN."""
    return lambda iou: torch.where(iou.isnan(), 1, torch.exp(-(iou * iou) / sigma))


def _hard(
    bbox: Tensor, score: Tensor, cls: Tensor, thr: float, max_det: int, min_score: float, offset: int
) -> tuple[Tensor, Tensor]:
    """Return indices and scores of the kept boxes of one image, best first."""
    candidate = (score > min_score).nonzero()[:, 0]
    order = candidate[torch.sort(score[candidate], descending=True, stable=True).indices]
    bbox, cls = bbox[order], cls[order]
    area = inclusive_area(bbox, offset)

    def suppress(i: Tensor, j: Tensor) -> Tensor:
        """Return bool (len(i), len(j)): True if box i, once kept, suppresses box j."""
        iou = inclusive_iou(bbox[i][:, None], area[i][:, None], bbox[j], area[j], offset)
        return (iou > thr) & (cls[i][:, None] == cls[j])

    position = torch.arange(len(order), device=bbox.device)
    kept = position[:0]
    for block in position.split(_BLOCK):
        if len(kept) >= max_det:  # the others have lower scores
            break
        alive = ~suppress(kept, block).any(dim=0)
        kept = torch.cat([kept, block[_greedy(suppress(block, block).triu(1), alive)]])
    index = order[kept[:max_det]]
    return index, score[index]


def _greedy(suppress: Tensor, alive: Tensor) -> Tensor:
    """Return bool (B,): the kept ones of the boxes alive (B,), where suppress (B, B) is True at [i, j] only for i < j.

    Repeats the rule "a box is kept if no kept box suppresses it" until nothing changes. Every iteration decides at
    least one more box for good, in the order of their scores, so it converges to the greedy result, usually after two
    to five iterations.
    """
    table = suppress.float()  # a product with a vector is the fastest "any" over columns
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
    """Return indices and lowered scores of the kept boxes of one image, best first."""
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
    """Return indices (N, D), padded with -1, and scores (N, D), padded with 0, from those of every image."""
    index = torch.full((len(kept), max_det), -1, device=score.device)
    kept_score = score.new_zeros(len(kept), max_det)
    for n, (image_index, image_score) in enumerate(kept):
        index[n, : len(image_index)] = image_index
        kept_score[n, : len(image_score)] = image_score
    return index, kept_score
