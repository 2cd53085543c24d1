"""Numbers of the report, from annotations and detections. hotcoco computes most of them.

G annotated boxes, D detections, K classes, S detections of one class. Unless stated otherwise a detection is right if
it is the best of those that overlap a box of its class by an IoU of 0.5 or more.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from core.report.coco_files import FoundBoxes, Truth
from core.report.detector_report.bootstrap import RESAMPLED, Resampler, draw_weights, interval
from core.report.evaluation import Evaluation, hotcoco_datasets, score

NUM_RESAMPLE = 300  # of the bootstrap
SIDES = (0, 16, 32, 64, 96, 128, 256, 512)  # square roots of object areas, in pixels, that separate the groups
MAX_GROUP = 4  # of image sizes
_RIGHT, _WRONG, _IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Match:
    """Detections and boxes that belong together."""

    status: np.ndarray  # (D,) 1: right, 0: wrong, -1: in a crowd, or beyond max_det
    box_of: np.ndarray  # (D,) row of the box that a detection found; -1: none
    is_found: np.ndarray  # (G,) bool
    is_missed: np.ndarray  # (G,) bool; crowds are neither found nor missed
    right: dict[int, int]  # image number to detections that are right
    wrong: dict[int, int]
    missed: dict[int, int]


@dataclass(frozen=True)
class ScoreCurve:
    """Precision, recall and F1 of the detections that score at least some value, best first."""

    score: np.ndarray  # (S,) descending
    precision: np.ndarray  # (S,)
    recall: np.ndarray  # (S,)

    @property
    def f1(self) -> np.ndarray:
        return 2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-12)

    def at(self, i: int) -> tuple[float, float, float, float]:
        """Return score, precision, recall and F1 at position `i`."""
        return float(self.score[i]), float(self.precision[i]), float(self.recall[i]), float(self.f1[i])

    @property
    def best(self) -> int | None:
        """Position of the largest F1; None without detections."""
        return int(self.f1.argmax()) if len(self.score) else None


class Analysis:
    """Everything that the report says about one result. Parts are computed when they are asked for.

    kept: the detections that score at least `min_score`, which is what a user of the detector sees.
    """

    def __init__(self, truth: Truth, found: FoundBoxes, min_score: float, max_det: int = 100) -> None:
        """Match the detections. Raises ValueError if hotcoco is not installed."""
        if importlib.util.find_spec("hotcoco") is None:
            raise ValueError("the report needs hotcoco: pip install hotcoco")
        self.truth, self.found, self.min_score, self.max_det = truth, found, min_score, max_det
        self.evaluation: Evaluation = score(truth, found, max_det)
        self._evaluator = _evaluator(truth, found, max_det)
        self._evaluator.accumulate()
        self.match = self._match(self._evaluator, np.arange(len(found)))
        rows = np.flatnonzero(found.score >= min_score)
        self.kept_rows = rows
        self.kept_match = self._match(_evaluator(truth, _take(found, rows), max_det), rows)

    def _match(self, evaluator: Any, rows: np.ndarray) -> Match:
        """Return the match of the detections `rows`; the others are ignored."""
        numbers = evaluator.image_diagnostics(iou_thr=0.5)
        status = np.full(len(self.found), _IGNORED)
        box_of = np.full(len(self.found), -1)
        for number, value in numbers["dt_status"].items():
            status[rows[number - 1]] = {"tp": _RIGHT, "fp": _WRONG}.get(value, _IGNORED)
        for number, box in numbers["dt_match"].items():
            box_of[rows[number - 1]] = box - 1
        is_found, is_missed = np.zeros((2, len(self.truth.boxes)), dtype=bool)
        for number, value in numbers["gt_status"].items():  # crowds are not among them
            (is_found if value == "matched" else is_missed)[number - 1] = True
        return Match(
            status,
            box_of,
            is_found,
            is_missed,
            right=_count(self.found.image[status == _RIGHT]),
            wrong=_count(self.found.image[status == _WRONG]),
            missed=_count(self.truth.boxes.image[is_missed]),
        )

    def precision_at_recall(self, k: int | None, iou: float) -> tuple[np.ndarray, np.ndarray]:
        """Return recall (101,) and precision (101,) of class `k` (0..), or their mean over the classes that have boxes.

        NaN: the class has no boxes.
        """
        threshold = round((iou - 0.5) / 0.05)
        precision = self._evaluator.eval["precision"][threshold, :, :, 0, -1]  # (101, K)
        has_box = (precision > -1).all(axis=0)  # (K,)
        recall = np.linspace(0, 1, 101)
        if k is None:
            return recall, precision[:, has_box].mean(axis=1) if has_box.any() else np.full(101, np.nan)
        return recall, precision[:, k] if has_box[k] else np.full(101, np.nan)

    def score_curve(self, k: int | None) -> ScoreCurve:
        """Return the curve of class `k` (0..), or of all detections together."""
        counted = self.match.status != _IGNORED
        boxes = ~self.truth.boxes.crowd
        if k is not None:
            counted &= self.found.category == k + 1
            boxes &= self.truth.boxes.category == k + 1
        rows = np.flatnonzero(counted)
        rows = rows[np.argsort(-self.found.score[rows], kind="stable")]
        values, right = self.found.score[rows], np.cumsum(self.match.status[rows] == _RIGHT)
        last = np.flatnonzero(np.append(values[1:] != values[:-1], True)) if len(values) else rows  # of equal scores
        recall = right[last] / max(1, int(boxes.sum()))
        return ScoreCurve(values[last], right[last] / (last + 1), recall)

    @cached_property
    def confusion(self) -> np.ndarray:
        """(K + 1, K + 1) counts of kept detections: rows are true classes, columns found ones, the last background."""
        rows = self.kept_rows[self.kept_match.status[self.kept_rows] != _IGNORED]  # those in crowds are not errors
        evaluator = _evaluator(self.truth, _take(self.found, rows), self.max_det, evaluate=False)
        return evaluator.confusion_matrix(iou_thr=0.5, max_det=max(1, len(rows)))["matrix"].astype(np.int64)

    @cached_property
    def errors(self) -> dict[str, Any]:
        """TIDE's errors (Bolya et al., 2020) as hotcoco.COCOeval.tide_errors returns them."""
        return self._evaluator.tide_errors()

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """Calibration of the scores as hotcoco.COCOeval.calibration returns it."""
        return self._evaluator.calibration(n_bins=10)

    @cached_property
    def resampler(self) -> Resampler:
        """AP of resampled images."""
        right, wrong = np.zeros((2, 10, len(self.found)), dtype=bool)
        for t, threshold in enumerate(self._evaluator.params.iou_thrs):
            status = self._evaluator.image_diagnostics(iou_thr=threshold)["dt_status"]
            for values, name in ((right, "tp"), (wrong, "fp")):
                values[t, [number - 1 for number, value in status.items() if value == name]] = True
        return Resampler(self.truth, self.found, right, wrong)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals of AP, AP50 and AP75 over images, with a fixed seed."""
        if self.evaluation.AP < 0:
            return {}
        drawn = draw_weights(self.resampler.num_image, NUM_RESAMPLE)
        values = np.array([self.resampler.scores(weights) for weights in drawn])  # (resamples, 3)
        return {name: interval(column) for name, column in zip(RESAMPLED, values.T, strict=True)}

    @cached_property
    def by_object_size(self) -> list[tuple[str, int, float, float]]:
        """(range of sides, boxes, AP, AP50) of objects by the square root of their area, where there are any."""
        areas = self.truth.boxes.area[~self.truth.boxes.crowd]
        edges = [*zip(SIDES, (*SIDES[1:], 10**5), strict=True)]
        evaluator = _evaluator(self.truth, self.found, self.max_det, evaluate=False)
        limits = [[float(a * a), float(np.nextafter(b * b, 0))] for a, b in edges]  # both belong to the range
        evaluator.params.area_rng = [[0, 1e10], *limits]
        evaluator.params.area_rng_lbl = ["all", *(f"from {a}" for a, _ in edges)]
        evaluator.evaluate()
        evaluator.accumulate()
        precision = evaluator.eval["precision"][:, :, :, 1:, -1]  # (T, 101, K, groups)
        rows = []
        for i, (a, b) in enumerate(edges):
            values = precision[..., i]
            if not (values > -1).any():
                continue
            name = f"{a} to {b}" if b <= SIDES[-1] else f"{a} and more"
            count = int(((areas >= limits[i][0]) & (areas <= limits[i][1])).sum())
            AP, AP50 = (float(v[v > -1].mean()) for v in (values, values[0]))
            rows.append((name, count, AP, AP50))
        return rows

    @cached_property
    def by_image_size(self) -> list[tuple[str, int, float, float]]:
        """(range of longer sides, images, AP, AP50) of images by their longer side, in up to four groups."""
        longer = np.array([max(image["width"], image["height"]) for image in self.truth.images])
        sizes = np.unique(longer)
        if len(sizes) <= MAX_GROUP:
            groups = {f"{size}": longer == size for size in sizes.tolist()}
        else:
            edges = np.unique(np.quantile(longer, np.linspace(0, 1, MAX_GROUP + 1), method="nearest"))
            group = np.clip(np.searchsorted(edges, longer, side="right") - 1, 0, len(edges) - 2)
            members = [longer[group == i] for i in range(len(edges) - 1)]
            groups = {f"{m.min()} to {m.max()}": group == i for i, m in enumerate(members) if len(m)}
        slices = {name: (np.flatnonzero(mine) + 1).tolist() for name, mine in groups.items()}
        scores = self._evaluator.slice_by(slices)
        return [(name, len(slices[name]), scores[name]["AP"], scores[name]["AP50"]) for name in groups]

    def worst_images(self, limit: int) -> list[int]:
        """Numbers of the images with the lowest F1 of the kept detections; of equals those with most errors first."""

        def rank(image: int) -> tuple[float, int]:
            right, wrong, missed = (counts.get(image, 0) for counts in (match.right, match.wrong, match.missed))
            return 2 * right / (2 * right + wrong + missed), -(wrong + missed)

        match = self.kept_match
        return sorted({*match.wrong, *match.missed}, key=rank)[:limit]

    def false_positives(self, limit: int) -> list[int]:
        """Rows of the kept detections that are wrong, highest score first."""
        wrong = np.flatnonzero(self.kept_match.status == _WRONG)
        return wrong[np.argsort(-self.found.score[wrong], kind="stable")][:limit].tolist()

    def misses(self, limit: int) -> list[int]:
        """Rows of the boxes that no kept detection finds, largest first."""
        missed = np.flatnonzero(self.kept_match.is_missed)
        return missed[np.argsort(-self.truth.boxes.area[missed], kind="stable")][:limit].tolist()

    def without_truth(self, limit: int) -> list[int]:
        """Rows of kept detections that overlap no box of any class by 0.1 or more, highest score first."""
        rows = self.false_positives(len(self.found))
        alone = (row for row in rows if self._best_overlap(self.truth.boxes, self.found, row)[1] < 0.1)
        return [row for row, _ in zip(alone, range(limit), strict=False)]

    def found_by_nothing(self, limit: int) -> list[int]:
        """Rows of boxes that no detection of any class and score overlaps by 0.5 or more, largest first."""
        missed = np.flatnonzero(self.match.is_missed)
        missed = missed[np.argsort(-self.truth.boxes.area[missed], kind="stable")]
        alone = (row for row in missed.tolist() if self._best_overlap(self.found, self.truth.boxes, row)[1] < 0.5)
        return [row for row, _ in zip(alone, range(limit), strict=False)]

    def explain(self, row: int) -> str:
        """Return the reason why a detection is wrong, as text."""
        box, overlap = self._best_overlap(self.truth.boxes, self.found, row)
        if overlap < 0.1:
            return "nothing is there"
        name = self.truth.class_names[self.truth.boxes.category[box] - 1]
        if self.truth.boxes.category[box] != self.found.category[row]:
            return f"on a {name} (IoU {overlap:.2f})"
        return f"second detection of a {name}" if overlap >= 0.5 else f"beside a {name} (IoU {overlap:.2f})"

    def _best_overlap(self, others: Any, boxes: Any, row: int) -> tuple[int, float]:
        """Return the row of `others` that overlaps box `row` most, and their IoU; (-1, 0) without one."""
        rows = np.flatnonzero(others.image == boxes.image[row])
        if not len(rows):
            return -1, 0.0
        overlap = iou(others.bbox[rows], boxes.bbox[row])
        return int(rows[overlap.argmax()]), float(overlap.max())


def iou(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes (n, 4) with one box (4,), all x, y, w, h: (n,)."""
    start, end = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, :2] + boxes[:, 2:], box[:2] + box[2:])
    inner = np.maximum(end - start, 0).prod(axis=1)
    return inner / np.maximum(boxes[:, 2:].prod(axis=1) + box[2:].prod() - inner, 1e-12)


def _evaluator(truth: Truth, found: FoundBoxes, max_det: int, evaluate: bool = True) -> Any:
    from hotcoco import COCOeval

    evaluator = COCOeval(*hotcoco_datasets(truth, found), "bbox")
    evaluator.params.max_dets = [1, 10, max_det]
    if evaluate:
        evaluator.evaluate()
    return evaluator


def _take(found: FoundBoxes, rows: np.ndarray) -> FoundBoxes:
    return FoundBoxes(found.image[rows], found.category[rows], found.bbox[rows], found.score[rows])


def _count(images: np.ndarray) -> dict[int, int]:
    numbers, counts = np.unique(images, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def best_thresholds(analysis: Analysis) -> Mapping[int, tuple[float, float, float, float]]:
    """Return score, precision, recall and F1 at the score of each class's best F1, by class (0..)."""
    best = {}
    for k in range(len(analysis.truth.class_names)):
        curve = analysis.score_curve(k)
        i = curve.best
        if i is not None and curve.recall[i] > 0:
            best[k] = curve.at(i)
    return best
