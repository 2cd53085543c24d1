"""Bootstrap intervals of AP: the scores of resampled images, each drawn as often as chance has it.

hotcoco's own bootstrap was not used: it counts an image that is drawn several times once, and its intervals are a
quarter too narrow (0.76 of the width; sqrt(1/e / (1 - 1/e)) for a mean).

G boxes, D detections, N images, K classes, T IoU thresholds. Boxes are matched once; a resample only weights images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from core.report.coco_files import FoundBoxes, Truth

RESAMPLED = ("AP", "AP50", "AP75")
_RECALL = np.linspace(0, 1, 101)


class Resampler:
    """AP of weighted images.

    right, wrong: (T, D) bool, detections that count as such at the IoU thresholds 0.50, 0.55 ... 0.95.
    """

    def __init__(self, truth: Truth, found: FoundBoxes, right: np.ndarray, wrong: np.ndarray) -> None:
        boxes = truth.boxes
        self.num_image = len(truth.image_ids)
        self._classes = []  # per class: images of its boxes; images, right and wrong of its detections, best first
        order = np.lexsort((found.image, -found.score))
        for k in range(1, len(truth.class_names) + 1):
            of_boxes = boxes.image[(boxes.category == k) & ~boxes.crowd] - 1
            rows = order[found.category[order] == k]
            if len(of_boxes):
                self._classes.append((of_boxes, found.image[rows] - 1, right[:, rows], wrong[:, rows]))

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """Return AP, AP50 and AP75 (3,) of images that are present `weights` (N,) times; NaN without any box."""
        precisions = []
        for of_boxes, of_found, right, wrong in self._classes:
            num_box = weights[of_boxes].sum()
            if num_box:
                precisions.append(_mean_precision(weights[of_found], right, wrong, num_box))
        if not precisions:
            return np.full(3, np.nan)
        by_threshold = np.mean(precisions, axis=0)  # (K, T) -> (T,)
        return np.array([by_threshold.mean(), by_threshold[0], by_threshold[5]])


def _mean_precision(weights: np.ndarray, right: np.ndarray, wrong: np.ndarray, num_box: int) -> np.ndarray:
    """Return the mean precision at COCO's 101 points of recall, (T,), of detections in the order of their scores."""
    num_right, num_wrong = np.cumsum(right * weights, axis=1), np.cumsum(wrong * weights, axis=1)  # (T, S)
    recall = num_right / num_box
    precision = num_right / np.maximum(num_right + num_wrong, 1)
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # at that recall or a larger one
    padded = np.pad(highest, ((0, 0), (0, 1)))  # a recall that is not reached has precision 0
    at = [np.searchsorted(line, _RECALL, side="left") for line in recall]
    return np.array([line[index].mean() for line, index in zip(padded, at, strict=True)])


def draw_weights(num_image: int, num_resample: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield how often each image is drawn (N,), for every resample: N draws with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(num_resample):
        yield np.bincount(rng.integers(0, num_image, num_image), minlength=num_image)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of the resampled values; resamples without a box are left out."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
