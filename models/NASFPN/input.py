"""Input transforms of the NAS-FPN recipes: resize by the longer side, and crop a window of the input size.

Boxes are (G, 5) float32: xyxy with inclusive corners, in pixels of the current image, and the class. See
`models.record.Record` for the fields of a record.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from models.record import Record, input_sides, resize

if TYPE_CHECKING:
    from config.schema import ResizeParam


class ResizeCrop2DImageBbox:
    """Resize to the largest scale at which the image fits into the input; used in testing.

    For a square input the longer side becomes the input's side. Scaled sides are rounded down; boxes are scaled and
    clipped.
    """

    def __init__(self, pResize: ResizeParam) -> None:
        self.p = pResize

    def apply(self, record: Record) -> None:
        scale = _fit_scale(record["image"], self.p.short, self.p.long)
        resize(record, *_scaled_sides(record["image"], scale), scale)


class RandResizeCrop2DImageBbox:
    """Resize with random scale, then crop a random window; used in training.

    The scale fits the image into the input size times U(scale_min, scale_max). The window has at most the input size.
    Boxes are clipped to the window; those outside it are dropped.

    Ghiasi et al. 2019, "NAS-FPN", section 4.1 (scale jitter).
    """

    def __init__(self, pResize: ResizeParam) -> None:
        self.p = pResize

    def apply(self, record: Record) -> None:
        p, rng = self.p, record["rng"]
        factor = rng.uniform(p.scale_min, p.scale_max)
        scale = _fit_scale(record["image"], max(1, int(factor * p.short)), max(1, int(factor * p.long)))
        height, width = _scaled_sides(record["image"], scale)
        resize(record, height, width, scale)
        window_height, window_width = input_sides(record, p.short, p.long)
        top = int(max(0, height - window_height) * rng.uniform())
        left = int(max(0, width - window_width) * rng.uniform())
        _crop(record, top, left, min(height, window_height), min(width, window_width))


def _fit_scale(image: np.ndarray, short: int, long: int) -> float:
    height, width = image.shape[:2]
    return min(long / max(height, width), short / min(height, width))


def _scaled_sides(image: np.ndarray, scale: float) -> tuple[int, int]:
    """Return the scaled sides, rounded down. The margin keeps products such as 49 * (640 / 49) at 640 despite rounding
    errors."""
    height, width = image.shape[:2]
    return max(1, math.floor(height * scale + 1e-6)), max(1, math.floor(width * scale + 1e-6))


def _crop(record: Record, top: int, left: int, height: int, width: int) -> None:
    record["image"] = np.ascontiguousarray(record["image"][top : top + height, left : left + width])
    record["im_info"][:2] = height, width
    box = record["gt_bbox"]
    box[:, :4] -= np.array([left, top, left, top], np.float32)
    x1, y1, x2, y2 = box[:, :4].T
    box = box[(x2 >= 0) & (y2 >= 0) & (x1 <= width - 1) & (y1 <= height - 1)]
    box[:, 0:4:2] = box[:, 0:4:2].clip(0, width - 1)
    box[:, 1:4:2] = box[:, 1:4:2].clip(0, height - 1)
    record["gt_bbox"] = box
