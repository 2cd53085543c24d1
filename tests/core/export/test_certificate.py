"""Matching of detections and the tolerances of a certificate. Boxes are xyxy with inclusive corners."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from core.export.certificate import Certificate, Found, Tolerance, certify, detect_all, match
from core.inference import Detections
from models.record import Batch

BOXES = np.array([[0, 0, 9, 9], [20, 20, 39, 39], [60, 0, 79, 19]], np.float32)


def detections(bbox: np.ndarray, score: list[float], cls: list[int]) -> Detections:
    return Detections(0, "a.png", bbox.astype(np.float32), np.array(score, np.float32), np.array(cls))


THREE = detections(BOXES, [0.9, 0.8, 0.7], [1, 2, 1])


def batches(count: int) -> list[Batch]:
    return [{"files": ["a.png"], "im_id": torch.tensor([i])} for i in range(count)]


def compare(exported: Detections, reference: Detections = THREE, **options: Any) -> Certificate:
    """Compare what two detectors find, each the same in two images."""
    found = [Found(name, [one] * 2, 1.0) for name, one in (("file", exported), ("torch", reference))]
    return certify(*found, images="toy", **options)


def test_a_match_does_not_depend_on_the_order() -> None:
    turned = detections(BOXES[[2, 0, 1]], [0.7, 0.9, 0.8], [1, 1, 2])
    assert sorted(match(THREE, turned)) == [(0, 1), (1, 2), (2, 0)]


def test_a_match_needs_the_class_and_half_the_area() -> None:
    other_class = detections(BOXES, [0.9, 0.8, 0.7], [1, 1, 1])
    assert sorted(match(THREE, other_class)) == [(0, 0), (2, 2)]
    # 10 x 10 moved by 3: 70 common pixels of 130, IoU 0.54; by 4: 60 of 140, IoU 0.43
    one = detections(BOXES[:1], [1], [1])
    for moved, expected in ((3, [(0, 0)]), (4, [])):
        assert match(one, detections(BOXES[:1] + np.array([moved, 0, moved, 0]), [1], [1])) == expected


def test_of_two_equal_boxes_the_closer_score_is_matched() -> None:
    twice = detections(BOXES[[0, 0]], [0.5, 0.4], [1, 1])
    turned = detections(BOXES[[0, 0]], [0.4, 0.5], [1, 1])
    assert sorted(match(twice, turned)) == [(0, 1), (1, 0)]


def test_each_detection_is_matched_once() -> None:
    assert len(match(detections(BOXES[[0, 0]], [0.5, 0.4], [1, 1]), THREE)) == 1


def test_the_same_detections() -> None:
    certificate = compare(THREE)
    assert certificate.problems == []
    assert (certificate.num_image, certificate.num_exported, certificate.num_matched) == (2, 6, 6)
    assert "AP on these images            not computed" in certificate.text()
    assert certificate.text().endswith("result                        met\n")


@pytest.mark.parametrize(
    "box, score, expected",
    [
        (0.005, 0.0, []),
        (0.0, 0.00005, []),
        (0.02, 0.0, ["boxes differ by 0.02 pixels, more than 0.01"]),
        (0.0, 0.001, ["scores differ by 0.001, more than 0.0001"]),
    ],
)
def test_differences_beyond_the_tolerances(box: float, score: float, expected: list[str]) -> None:
    bbox = THREE.bbox + np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, box, 0]], np.float32)
    moved = replace(THREE, bbox=bbox, score=THREE.score - np.array([0, score, 0], np.float32))
    assert compare(moved).problems == expected


def test_detections_that_only_one_of_them_has() -> None:
    assert compare(detections(BOXES[:2], [0.9, 0.8], [1, 2])).problems == ["2 detections are not matched"]  # two images
    extra = detections(np.concatenate([BOXES, BOXES[:1] + 100]), [0.9, 0.8, 0.7, 0.1], [1, 2, 1, 1])
    assert compare(extra).problems == ["2 detections are not matched"]
    nothing = detections(np.empty((0, 4)), [], [])
    assert compare(nothing, nothing).problems == []
    assert compare(nothing).problems == ["6 detections are not matched"]


def test_a_lower_ap_where_detections_may_differ() -> None:
    def score(found: object) -> float:
        return 0.5 if len(found[0].score) == 3 else 0.48  # type: ignore[index]

    two = detections(BOXES[:2], [0.9, 0.8], [1, 2])
    for allowed, expected in ((0.03, []), (0.01, ["the AP is lower by 0.020, more than 0.01"])):
        certificate = compare(two, score=score, tolerance=Tolerance(box=None, score=None, ap=allowed))
        assert certificate.problems == expected
    assert "0.4800, reference 0.5000 (allowed: 0.01)" in certificate.text()
    assert json.loads(certificate.to_json())["problems"] == certificate.problems


def test_the_detectors_need_an_image() -> None:
    nothing = Found("file", [], 0.0)
    with pytest.raises(ValueError, match="no image to compare"):
        certify(nothing, nothing, images="toy")


def test_the_first_run_is_not_timed() -> None:
    seen: list[int] = []

    def run(batch: Batch) -> list[Detections]:
        if not seen:
            time.sleep(0.3)
        seen.append(int(batch["im_id"]))
        return [THREE]

    found = detect_all(run, batches(3), "slow at first")
    assert seen == [0, 0, 1, 2]
    assert len(found.detections) == 3
    assert found.ms < 100
