"""Detection in large images by tiles: cutting, and joining of the tiles' detections.

T tiles; D detections of a tile or an image. Boxes are xyxy with inclusive corners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EDGE = 2.0  # pixels: a box that ends this near to a cut may go on behind it
PART = 0.5  # a cut box is dropped if this share of it lies inside of another box of its class


@dataclass(frozen=True)
class Tile:
    """A part of an image, in pixels of the image."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """Return the tile's pixels."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def cut(height: int, width: int, tile: int | None, overlap: int) -> list[Tile]:
    """Return the tiles of an image: the whole image, and, if it is larger than a tile, tiles that cover it.

    Tiles have the side `tile`, or the image's if that is shorter, and overlap by at least `overlap` pixels. The whole
    image finds the objects that are larger than the overlap, which no tile may have in one piece.
    """
    whole = Tile(0, 0, height, width)
    if tile is None or max(height, width) <= tile:
        return [whole]
    rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
    parts = [Tile(top, left, min(tile, height), min(tile, width)) for top in rows for left in columns]
    return [whole, *parts]


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Return the first pixels of the tiles along one side, evenly spread."""
    if side <= tile:
        return [0]
    count = -(-(side - overlap) // (tile - overlap))
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def join(parts: Sequence[tuple[Tile, np.ndarray]], size: tuple[int, int], *, thr: float, max_det: int) -> np.ndarray:
    """Return the detections of an image from those of its tiles, best first: (D, 6) x1, y1, x2, y2, score, class.

    Greedy NMS per class over all tiles, with two differences. Boxes that end at a cut come after all others, as they
    may be a part of an object that another tile has as a whole; and they are dropped if most of their area lies inside
    of a box that is kept, however large that is.

    parts: the tiles with their detections (D, 6) in pixels of the tile. size: height and width of the image. thr: IoU
    from which NMS drops a box.
    """
    rows, is_cut = [], []
    for tile, found in parts:
        shifted = found + np.array([tile.left, tile.top, tile.left, tile.top, 0, 0], found.dtype)
        rows.append(shifted)
        is_cut.append(_ends_at_cut(shifted[:, :4], tile, size))
    found, cut_off = np.concatenate(rows), np.concatenate(is_cut)
    order = np.lexsort((-found[:, 4], cut_off))
    is_kept = np.zeros(len(found), bool)
    for cls in np.unique(found[:, 5]):
        mine = order[found[order, 5] == cls]
        is_kept[mine[_suppress(found[mine, :4], cut_off[mine], thr)]] = True
    best = found[order[is_kept[order]]]
    return best[np.argsort(-best[:, 4], kind="stable")][:max_det]


def _ends_at_cut(boxes: np.ndarray, tile: Tile, size: tuple[int, int]) -> np.ndarray:
    """Return (D,) bool: True for boxes that end at an edge of the tile that is not one of the image."""
    x1, y1, x2, y2 = boxes.T
    bottom, right = tile.top + tile.height, tile.left + tile.width
    at_cut = (tile.left > 0) & (x1 <= tile.left + EDGE)
    at_cut |= (tile.top > 0) & (y1 <= tile.top + EDGE)
    at_cut |= (right < size[1]) & (x2 >= right - 1 - EDGE)
    return at_cut | ((bottom < size[0]) & (y2 >= bottom - 1 - EDGE))


def _suppress(boxes: np.ndarray, cut_off: np.ndarray, thr: float) -> np.ndarray:
    """Return (D,) bool, the boxes (D, 4) of one class that NMS keeps; they come in the order of their precedence."""
    start, end = boxes[:, :2], boxes[:, 2:]
    area = (end - start + 1).prod(axis=1)
    is_kept = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if not is_kept[i]:
            continue
        later = slice(i + 1, None)
        sides = np.maximum(np.minimum(end[i], end[later]) - np.maximum(start[i], start[later]) + 1, 0)
        shared = sides.prod(axis=1)
        covered = shared > thr * (area[later] + area[i] - shared)
        is_kept[later] &= ~(covered | (cut_off[later] & (shared >= PART * area[later])))
    return is_kept
