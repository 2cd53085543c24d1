"""Bootstrap intervals: a resample scores as its images do by hotcoco, and intervals are as wide as theory says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.report.coco_files import FoundBoxes, TrueBoxes, Truth
from core.report.detector_report.analysis import Analysis
from core.report.detector_report.bootstrap import Resampler, draw_weights, interval
from core.report.evaluation import score


def image_set(truth_boxes: TrueBoxes, num_image: int, num_class: int) -> Truth:
    numbers = tuple(range(1, num_image + 1))
    images = tuple({"id": i, "width": 640, "height": 480} for i in numbers)
    classes = tuple(range(1, num_class + 1))
    return Truth(Path("truth.json"), images, numbers, classes, tuple(f"class {k}" for k in classes), truth_boxes)


def random_result(seed: int, num_image: int = 15) -> tuple[Truth, FoundBoxes]:
    """Return boxes of three classes, some crowds, and detections: moved boxes, some of another class.

    Scores are equal between images, but not within: their order there is that of the copies of an image.
    """
    rng = np.random.default_rng(seed)
    count = 60
    image, category = rng.integers(1, num_image + 1, count), rng.integers(1, 4, count)
    bbox = np.concatenate([rng.uniform(0, 400, (count, 2)), rng.uniform(10, 200, (count, 2))], axis=1)
    crowd = rng.random(count) < 0.1
    truth = image_set(TrueBoxes(image, category, bbox, bbox[:, 2:].prod(axis=1), crowd), num_image, 3)
    again = rng.integers(0, count, 150)
    moved = bbox[again] + rng.normal(0, 6, (150, 4))
    moved[:, 2:] = np.maximum(moved[:, 2:], 1)
    found_category = np.where(rng.random(150) < 0.8, category[again], rng.integers(1, 4, 150))
    scores = np.zeros(150)
    for number in range(1, num_image + 1):
        mine = image[again] == number
        scores[mine] = rng.choice(np.arange(1, 40), int(mine.sum()), replace=False) / 40
    return truth, FoundBoxes(image[again], found_category, moved, scores)


def repeated(truth: Truth, found: FoundBoxes, weights: np.ndarray) -> tuple[Truth, FoundBoxes]:
    """Return the image set that has every image as often as its weight says, copies as images of their own."""
    drawn = np.repeat(np.arange(1, len(weights) + 1), weights)
    true_rows = [np.flatnonzero(truth.boxes.image == image) for image in drawn]
    found_rows = [np.flatnonzero(found.image == image) for image in drawn]
    new = np.arange(1, len(drawn) + 1)
    t, f = np.concatenate(true_rows), np.concatenate(found_rows)
    of_true, of_found = (np.repeat(new, [len(rows) for rows in group]) for group in (true_rows, found_rows))
    boxes = truth.boxes
    copied = TrueBoxes(of_true, boxes.category[t], boxes.bbox[t], boxes.area[t], boxes.crowd[t])
    copies = image_set(copied, len(drawn), len(truth.class_names))
    return copies, FoundBoxes(of_found, found.category[f], found.bbox[f], found.score[f])


@pytest.mark.parametrize("seed", range(4))
def test_a_resample_scores_as_its_images_do(seed: int) -> None:
    truth, found = random_result(seed)
    resampler = Analysis(truth, found, 0.3).resampler
    everything = np.ones(len(truth.image_ids), dtype=np.int64)
    np.testing.assert_allclose(resampler.scores(everything), score(truth, found, 100).stats[:3], rtol=1e-12)
    for weights in draw_weights(len(truth.image_ids), 5, seed):
        expected = score(*repeated(truth, found, weights), 100).stats[:3]
        np.testing.assert_allclose(resampler.scores(weights), expected, rtol=1e-12)


def test_a_resample_without_a_box_is_left_out() -> None:
    truth, found = random_result(0)
    resampler = Analysis(truth, found, 0.3).resampler
    assert np.isnan(resampler.scores(np.zeros(len(truth.image_ids), dtype=np.int64))).all()
    assert interval([0.5, np.nan, 0.5]) == (0.5, 0.5)


def test_intervals_are_as_wide_as_theory_says() -> None:
    """Of 400 boxes in as many images 60 % are found, and nothing else: AP is the recall, to a point of 101.

    Its standard deviation is sqrt(0.6 * 0.4 / 400) = 0.0245, so 95 % of the resamples lie within 0.048.
    """
    num_image, num_found = 400, 240
    image = np.arange(1, num_image + 1)
    bbox = np.tile(np.array([10.0, 10, 40, 40]), (num_image, 1))
    ones, none = np.ones(num_image, dtype=np.int64), np.zeros(num_image, dtype=bool)
    truth = image_set(TrueBoxes(image, ones, bbox, 1600.0 * ones, none), num_image, 1)
    found = FoundBoxes(image[:num_found], ones[:num_found], bbox[:num_found], 0.9 * ones[:num_found])
    right = np.ones((10, num_found), dtype=bool)
    resampler = Resampler(truth, found, right, ~right)
    values = [resampler.scores(weights)[0] for weights in draw_weights(num_image, 1000)]
    assert np.mean(values) == pytest.approx(0.6, abs=0.01)
    assert np.std(values) == pytest.approx(0.0245, rel=0.1)
    low, high = interval(values)
    assert (low, high) == (pytest.approx(0.6 - 0.048, abs=0.012), pytest.approx(0.6 + 0.048, abs=0.012))
