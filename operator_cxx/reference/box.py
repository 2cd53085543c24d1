"""Arithmetic of axis-aligned boxes, shared by the operators.

A box is xyxy in input pixels with inclusive corners: its width is x2 - x1 + 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A predicted box is at most 1000 / 16 times as wide or high as its anchor, so that exp() cannot overflow.
MAX_LOG_RATIO = math.log(1000.0 / 16.0)


def inclusive_area(box: Tensor, offset: int = 1) -> Tensor:
    """Return the areas (...) of boxes (..., 4). offset: 1 for inclusive corners, 0 for exclusive."""
    x1, y1, x2, y2 = box.unbind(-1)
    return (x2 - x1 + offset) * (y2 - y1 + offset)


def inclusive_iou(box1: Tensor, area1: Tensor, box2: Tensor, area2: Tensor, offset: int = 1) -> Tensor:
    """Return the intersection over union of boxes (..., 4) with boxes (..., 4), broadcast against each other.

    The areas (...) are those of `inclusive_area`, computed once by callers that compare a set with many others. IoUs
    are compared for equality, so the order of the operations is part of the result. offset: as in `inclusive_area`.
    """
    x1, y1, x2, y2 = box1.unbind(-1)
    left, top, right, bottom = box2.unbind(-1)
    width = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).add_(offset).clamp_(min=0)
    height = torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).add_(offset).clamp_(min=0)
    inter = width.mul_(height)
    return inter / (area1 + area2).sub_(inter)


def _center_and_size(box: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centres (..., 2) and sizes (..., 2) of boxes (..., 4), both as (x, y)."""
    size = box[..., 2:] - box[..., :2] + 1
    return box[..., :2] + 0.5 * (size - 1), size


def encode_box(anchor: Tensor, box: Tensor) -> Tensor:
    """Return the deltas (..., 4) dx, dy, dw, dh from anchors (..., 4) to boxes (..., 4).

    Girshick et al. 2014, "Rich feature hierarchies", appendix C.
    """
    anchor_center, anchor_size = _center_and_size(anchor)
    center, size = _center_and_size(box)
    return torch.cat([(center - anchor_center) / anchor_size, torch.log(size / anchor_size)], dim=-1)


def decode_box(anchor: Tensor, delta: Tensor) -> Tensor:
    """Return the boxes (..., 4) at deltas (..., 4) from anchors (..., 4), with dw and dh capped."""
    anchor_center, anchor_size = _center_and_size(anchor)
    center = delta[..., :2] * anchor_size + anchor_center
    size = delta[..., 2:].clamp(max=MAX_LOG_RATIO).exp() * anchor_size
    half = 0.5 * (size - 1)
    return torch.cat([center - half, center + half], dim=-1)
