"""Anchors: the boxes to which predictions are relative.

Shapes: A anchors per cell, H x W cells. Boxes are xyxy in input pixels with inclusive corners.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def base_anchors(stride: int, scales: Sequence[float], aspects: Sequence[float]) -> np.ndarray:
    """Return the anchors (A, 4) float64 of the cell at the origin, aspect-major, then scale.

    Anchors are centred on the cell [0, 0, stride - 1, stride - 1]. For an aspect (height / width), the cell is reshaped
    to approximately its own area with integer sides (halves round to even), then enlarged by each scale.

    Source: Ren et al. 2015, "Faster R-CNN", section 3.1.1, with the rounding of its released code.
    """
    center = 0.5 * (stride - 1)
    anchors = []
    for aspect in aspects:
        width = round(math.sqrt(stride * stride / aspect))
        height = round(width * aspect)
        for scale in scales:
            half_w, half_h = 0.5 * (width * scale - 1), 0.5 * (height * scale - 1)
            anchors.append((center - half_w, center - half_h, center + half_w, center + half_h))
    return np.array(anchors, dtype=np.float64).reshape(-1, 4)


def grid_anchors(
    height: int, width: int, stride: int, base: np.ndarray | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Return the anchors (H*W*A, 4) float32 of a height x width feature map, ordered by row, column, anchor.

    `base` is the result of `base_anchors`. Sums are computed in float64 and rounded once.
    """
    origin = torch.as_tensor(base, dtype=torch.float64, device=device)
    x = torch.arange(width, dtype=torch.float64, device=device) * stride
    y = torch.arange(height, dtype=torch.float64, device=device) * stride
    x, y = x.expand(height, width), y[:, None].expand(height, width)
    shift = torch.stack([x, y, x, y], dim=-1)  # (H, W, 4)
    anchors = shift[:, :, None] + origin  # (H, W, A, 4)
    return anchors.reshape(-1, 4).float()  # (H*W*A, 4)
