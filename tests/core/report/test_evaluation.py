"""COCO's numbers: equal to direct calls of pycocotools to the last digit, and computed by hand on a few boxes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.report.evaluation import STAT_NAMES, Evaluation, detections_to_coco, evaluate, write_result

CATEGORY_IDS = (3, 7, 90)


def make_truth(seed: int = 0, num_image: int = 12) -> dict[str, Any]:
    """Return random boxes of all sizes, some of them crowds; category 90 has none."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image_id in range(100, 100 + num_image):
        for _ in range(rng.integers(0, 8)):
            w, h = rng.uniform(4, 300, 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice(CATEGORY_IDS[:2])),
                    "bbox": [float(rng.uniform(0, 640 - w)), float(rng.uniform(0, 480 - h)), float(w), float(h)],
                    "area": float(w * h * rng.uniform(0.3, 1)),  # a mask is smaller than its box
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    return {
        "info": {},
        "images": [{"id": i, "width": 640, "height": 480} for i in range(100, 100 + num_image)],
        "categories": [{"id": i, "name": f"class {i}"} for i in CATEGORY_IDS],
        "annotations": annotations,
    }


def make_detections(truth: dict[str, Any], seed: int = 1) -> list[dict[str, Any]]:
    """Return each true box about twice, slightly moved, and as many random ones; some scores are equal."""
    rng = np.random.default_rng(seed)
    detections = []
    for annotation in truth["annotations"] * 2:
        moved = np.array(annotation["bbox"]) + rng.normal(0, 6, 4)
        moved[2:] = np.maximum(moved[2:], 1)
        for box, category_id in (
            (moved, annotation["category_id"]),
            (rng.uniform(1, 300, 4), rng.choice(CATEGORY_IDS)),
        ):
            detections.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(category_id),
                    "bbox": box.tolist(),
                    "score": float(np.round(rng.random(), 2)),
                }
            )
    return detections


def direct(truth_path: Path, result_path: Path) -> COCOeval:
    """Evaluate as pycocotools documents it."""
    truth = COCO(str(truth_path))
    evaluator = COCOeval(truth, truth.loadRes(str(result_path)), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("seed", range(4))
def test_numbers_equal_those_of_pycocotools_to_the_last_digit(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = make_truth(seed)
    truth_path = write_json(tmp_path / "truth.json", truth)
    detections = make_detections(truth, seed + 10)
    unchanged = copy.deepcopy(detections)
    write_result(tmp_path / "result.json", detections)
    from_list = evaluate(truth_path, detections)
    from_file = evaluate(truth_path, tmp_path / "result.json")
    assert capsys.readouterr().out == ""
    expected = direct(truth_path, tmp_path / "result.json")
    assert 0.05 < expected.stats[0] < 0.95
    assert from_list.stats == from_file.stats == tuple(expected.stats)
    assert expected.stats[0] == from_list.AP
    assert detections == unchanged
    printed = capsys.readouterr().out
    assert all(line in from_list.table for line in printed.splitlines() if "=" in line and "t=" not in line)
    for k, (name, ap) in enumerate(from_list.class_ap[:2]):
        assert name == f"class {CATEGORY_IDS[k]}"
        only = COCOeval(expected.cocoGt, expected.cocoDt, "bbox")
        only.params.catIds = [CATEGORY_IDS[k]]
        only.evaluate()
        only.accumulate()
        only.summarize()
        assert ap == only.stats[0]
    assert from_list.class_ap[2] == ("class 90", -1.0)


def one_box_each(**changes: Any) -> dict[str, Any]:
    """Return three images with one box of 40 x 40 each, with the fewest fields allowed."""
    return {
        "images": [{"id": i} for i in (1, 2, 3)],
        "categories": [{"id": 5, "name": "cat"}],
        "annotations": [{"image_id": i, "category_id": 5, "bbox": [10, 10, 40, 40]} | changes for i in (1, 2, 3)],
    }


def perfect(image_ids: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"image_id": i, "category_id": 5, "bbox": [10, 10, 40, 40], "score": 0.9} for i in image_ids]


def stats_of(result: Evaluation) -> dict[str, float]:
    return dict(zip(STAT_NAMES, result.stats, strict=True))


def test_annotations_without_id_area_and_iscrowd(tmp_path: Path) -> None:
    """All found: 1. 40 * 40 = 1600 lies between 32^2 and 96^2, so it is medium; there is nothing small or large."""
    path = write_json(tmp_path / "truth.json", one_box_each())
    stats = stats_of(evaluate(path, perfect((1, 2, 3))))
    assert stats == {name: -1.0 if name[-1] in "sl" else 1.0 for name in STAT_NAMES}


def test_an_annotation_with_id_0_counts(tmp_path: Path) -> None:
    truth = one_box_each()
    for number, annotation in enumerate(truth["annotations"]):
        annotation["id"] = number
    assert evaluate(write_json(tmp_path / "truth.json", truth), perfect((1, 2, 3))).AP == 1.0


def test_ap_of_two_thirds_by_hand(tmp_path: Path) -> None:
    """Two of three boxes found without an error: precision is 1 at the 67 recall points 0, 0.01 ... 0.66 of 101."""
    path = write_json(tmp_path / "truth.json", one_box_each())
    result = evaluate(path, perfect((1, 3)))
    assert pytest.approx(67 / 101) == result.AP
    assert stats_of(result)["AR100"] == pytest.approx(2 / 3)
    assert result.class_ap[0] == ("cat", result.AP)
    assert "cat  66.3" in result.table


def test_no_detections_score_zero(tmp_path: Path) -> None:
    path = write_json(tmp_path / "truth.json", make_truth())
    write_result(tmp_path / "result.json", [])
    for result in (evaluate(path, []), evaluate(path, tmp_path / "result.json")):
        assert set(result.stats) == {0.0}
        assert result.class_ap[0] == ("class 3", 0.0)
        assert result.table.startswith("nothing was detected")


def test_detections_become_coco_entries() -> None:
    bbox = np.array([[0, 0, 9, 19], [10.5, 20.25, 10.5, 20.25]], dtype=np.float32)
    entries = detections_to_coco(42, bbox, np.array([0.5, 0.25], dtype=np.float32), np.array([1, 3]), CATEGORY_IDS)
    assert entries == [
        {"image_id": 42, "category_id": 3, "bbox": [0.0, 0.0, 10.0, 20.0], "score": 0.5},
        {"image_id": 42, "category_id": 90, "bbox": [10.5, 20.25, 1.0, 1.0], "score": 0.25},
    ]
    assert json.loads(json.dumps(entries)) == entries


def test_an_image_without_detections_has_no_entries() -> None:
    assert detections_to_coco(1, np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64), CATEGORY_IDS) == []


@pytest.mark.parametrize("place", ["bbox", "score"])
def test_nan_is_refused(place: str) -> None:
    bbox, score = np.zeros((1, 4)), np.ones(1)
    {"bbox": bbox, "score": score}[place][0] = np.nan
    with pytest.raises(ValueError, match="image 42: detections are not finite"):
        detections_to_coco(42, bbox, score, np.array([1]), CATEGORY_IDS)


def test_a_result_file_is_json_and_written_atomically(tmp_path: Path) -> None:
    detections = make_detections(make_truth())
    path = tmp_path / "new" / "result.json"
    write_result(path, iter(detections))
    assert json.loads(path.read_text()) == detections
    with pytest.raises(ValueError, match="JSON"):
        write_result(path, [detections[0], {"score": float("nan")}])
    assert json.loads(path.read_text()) == detections
    assert os.listdir(path.parent) == ["result.json"]


@pytest.mark.parametrize(
    "truth, message",
    [
        ("{", "is not JSON, or only a part of it"),
        ("[]", "is not a COCO annotation file"),
        ('{"images": [], "categories": []}', "has no annotations to score against.*COCO's server"),
        (
            '{"images": [], "categories": [], "annotations": [{"image_id": 1}]}',
            "an annotation needs image_id, category_id and bbox",
        ),
    ],
)
def test_annotations_that_cannot_be_scored_against(tmp_path: Path, truth: str, message: str) -> None:
    path = tmp_path / "truth.json"
    path.write_text(truth)
    with pytest.raises(ValueError, match=message):
        evaluate(path, [])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": 4}, r"name 1 images that the annotations do not have, for example image_id 4"),
        ({"category_id": 6}, r"name 1 categories that the annotations do not have, for example category_id 6"),
    ],
)
def test_results_of_other_images_are_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    path = write_json(tmp_path / "truth.json", one_box_each())
    with pytest.raises(ValueError, match=message):
        evaluate(path, [perfect((1,))[0] | change])


def test_result_files_of_another_format_are_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "truth.json", one_box_each())
    with pytest.raises(ValueError, match="must be a list of detections"):
        evaluate(path, write_json(tmp_path / "result.json", {}))
    with pytest.raises(ValueError, match="a detection needs image_id, category_id, bbox and score"):
        evaluate(path, [{"image_id": 1}])
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.json"):
        evaluate(path, tmp_path / "nothing.json")


def test_training_and_testing_do_not_need_pycocotools() -> None:
    """Only the computation of AP imports it."""
    script = (
        "import sys; sys.modules['pycocotools'] = None\n"
        "import core.detection_module, core.inference, core.report.evaluation, detection_train, detection_test\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])
