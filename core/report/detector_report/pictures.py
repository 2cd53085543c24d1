"""Pictures of the report: images with ground truth and detections, and regions of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from core.data.image import read_image
from core.report.coco_files import Truth
from core.report.detector_report.analysis import Analysis
from core.report.draw import draw_detections
from core.report.page.html import Html, element, gallery, paragraph, picture

MARGIN = 1.0  # around a box, in sides of the box
MIN_REGION = 160  # pixels

Region = tuple[int, int, int, int]  # x1, y1, x2, y2, exclusive


class Pictures:
    """Draws images of a result, ground truth on the left and detections on the right.

    Raises FileNotFoundError if the folder of the images is missing, and ValueError if the annotations do not name files
    and sizes.
    """

    def __init__(self, analysis: Analysis, folder: Path, class_names: Sequence[str]) -> None:
        self.analysis, self.folder, self.class_names = analysis, folder, class_names
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: the report draws its images")
        for image in analysis.truth.images:
            if not {"file_name", "width", "height"} <= image.keys():
                raise ValueError(
                    f"{analysis.truth.path}: the report needs file_name, width and height of an image, got {image}"
                )

    def whole(self, image: int, caption: str) -> Html:
        """Return a figure of image number `image` with the detections that score at least the report's min_score."""
        return self._figure(image, None, caption, self.analysis.min_score)

    def around(self, image: int, bbox: np.ndarray, caption: str, min_score: float | None = None) -> Html:
        """Return a figure of the surroundings of `bbox` (x, y, w, h)."""
        entry = self.analysis.truth.images[image - 1]
        region = surroundings(bbox, int(entry["width"]), int(entry["height"]))
        return self._figure(image, region, caption, self.analysis.min_score if min_score is None else min_score)

    def _figure(self, image: int, region: Region | None, caption: str, min_score: float) -> Html:
        entry = self.analysis.truth.images[image - 1]
        name = str(entry["file_name"])
        try:
            pixels = read_image(str(self.folder / name), int(entry["height"]), int(entry["width"]))
        except (OSError, ValueError) as error:
            return element("figure", element("figcaption", f"{caption} (not drawn: {error})"))
        truth, found = self.analysis.truth.boxes, self.analysis.found
        mine = np.flatnonzero((truth.image == image) & ~truth.crowd)
        gt = np.column_stack([_corners(truth.bbox[mine]), truth.category[mine]])  # (G, 5)
        rows = np.flatnonzero((found.image == image) & (found.score >= min_score))
        det = np.column_stack([_corners(found.bbox[rows]), found.score[rows], found.category[rows]])  # (D, 6)
        if region is not None:
            x1, y1, x2, y2 = region
            pixels = np.ascontiguousarray(pixels[y1:y2, x1:x2])
            gt, det = _inside(gt, region), _inside(det, region)
        drawn = draw_detections(pixels, gt, det, self.class_names, min_score=min_score)
        return picture(drawn, f"{name}: {caption}")


def surroundings(bbox: np.ndarray, width: int, height: int) -> Region:
    """Return the region around a box: the box and a margin of its own size, at least MIN_REGION, inside the image."""
    x, y, w, h = (float(value) for value in bbox)
    region = []
    for start, side, limit in ((x, w, width), (y, h, height)):
        length = min(limit, max(MIN_REGION, side * (1 + 2 * MARGIN), 0.6 * max(w, h) * (1 + 2 * MARGIN)))
        first = round(min(max(start + side / 2 - length / 2, 0), limit - length))
        region.append((first, min(limit, first + max(1, round(length)))))
    (x1, x2), (y1, y2) = region
    return x1, y1, x2, y2


def figures(rows: Sequence[int], draw: Callable[[int], Html], nothing: str) -> Html:
    """Return a gallery of a figure per row, or the text `nothing` if there are no rows."""
    return gallery(draw(row) for row in rows) if rows else paragraph(nothing)


def file_name(truth: Truth, image: int) -> str:
    return str(truth.images[image - 1].get("file_name", truth.image_ids[image - 1]))


def _corners(bbox: np.ndarray) -> np.ndarray:
    """Return x, y, w, h as x1, y1, x2, y2 with inclusive corners, (n, 4)."""
    return np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:] - 1], axis=1)


def _inside(rows: np.ndarray, region: Region) -> np.ndarray:
    """Return the rows whose boxes reach into the region, in its pixels."""
    x1, y1, x2, y2 = region
    rows = rows[(rows[:, 2] >= x1) & (rows[:, 0] < x2) & (rows[:, 3] >= y1) & (rows[:, 1] < y2)]
    rows[:, :4] -= (x1, y1, x1, y1)
    return rows
