"""COCO's numbers: equal to direct calls of pycocotools to the last digit, and computed by hand on a few boxes."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.report import evaluation as evaluation_module
from core.report.coco_files import read_found, read_truth
from core.report.evaluation import (
    detections_to_coco,
    evaluate,
    score,
    stat_names,
    write_result,
    write_scores,
)

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
            (rng.uniform(1, 300, 4), rng.choice([c["id"] for c in truth["categories"]])),
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


def direct_from(truth: dict[str, Any], detections: list[dict[str, Any]]) -> COCOeval:
    """Evaluate with pycocotools from memory, silently."""
    with redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = truth
        dataset.createIndex()
        evaluator = COCOeval(dataset, dataset.loadRes(detections) if detections else COCO(), "bbox")
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
    for k, row in enumerate(from_list.classes[:2]):
        assert row.name == f"class {CATEGORY_IDS[k]}"
        only = COCOeval(expected.cocoGt, expected.cocoDt, "bbox")
        only.params.catIds = [CATEGORY_IDS[k]]
        only.evaluate()
        only.accumulate()
        only.summarize()
        assert (only.stats[0], only.stats[1]) == (row.AP, row.AP50)
        boxes = [a for a in truth["annotations"] if a["category_id"] == CATEGORY_IDS[k] and not a["iscrowd"]]
        assert (row.num_box, row.num_image) == (len(boxes), len({a["image_id"] for a in boxes}))
    empty = from_list.classes[2]
    assert (empty.name, empty.AP, empty.AP50, empty.num_box, empty.num_image) == ("class 90", -1.0, -1.0, 0, 0)


def box(draw: st.DrawFn) -> list[float]:
    """Return a box on a coarse grid, so that IoUs and areas often lie on a threshold, or with any float."""
    grid = st.integers(0, 12).map(lambda v: 8.0 * v)
    return [draw(st.one_of(grid, st.floats(0.0, 120.0))) for _ in range(4)]


@st.composite
def image_sets(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return annotations, some without area, iscrowd or a usable id, and detections in some of their images."""
    image_ids = draw(st.lists(st.integers(-3, 50), min_size=1, max_size=4, unique=True))
    category_ids = draw(st.lists(st.integers(0, 90), min_size=1, max_size=3, unique=True))
    ids = st.fixed_dictionaries({"image_id": st.sampled_from(image_ids), "category_id": st.sampled_from(category_ids)})
    boxes = st.composite(box)()
    optional = {"area": st.sampled_from([0.0, 1024.0, 9216.0, 9216.5]), "iscrowd": st.integers(0, 1)}
    optional["id"] = st.sampled_from([0, 1, "a", "b", -1])
    annotation = st.tuples(ids, st.fixed_dictionaries({"bbox": boxes}, optional=optional)).map(lambda t: t[0] | t[1])
    scores = st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(0.0, 1.0))
    detection = st.tuples(ids, st.fixed_dictionaries({"bbox": boxes, "score": scores})).map(lambda t: t[0] | t[1])
    truth = {
        "images": [{"id": i} for i in image_ids],
        "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
        "annotations": draw(st.lists(annotation, min_size=1, max_size=12)),
    }
    return truth, draw(st.lists(detection, max_size=24))


@settings(deadline=None, max_examples=150)
@given(image_sets(), st.sampled_from([11, 100, 300]))
def test_hotcoco_and_pycocotools_agree_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Any], list[dict[str, Any]]], max_det: int
) -> None:
    """Precision and recall of every threshold, class and area, and with them every number that is printed."""
    path = write_json(tmp_path_factory.getbasetemp() / "truth.json", drawn[0])
    truth = read_truth(path)
    found = read_found(drawn[1], truth)
    max_dets = (1, 10, max_det)
    ours = evaluation_module.accumulate_hotcoco(truth, found, max_dets)
    theirs = evaluation_module.accumulate_pycocotools(truth, found, max_dets)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert (stats := score(truth, found, max_det).stats)[0] == evaluation_module._mean(theirs[0][:, :, :, 0, -1])
    if max_det == 100:
        numbered = [a | {"id": i} for i, a in enumerate(drawn[0]["annotations"], start=1)]
        complete = [{"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0} | a for a in numbered]
        expected = direct_from(drawn[0] | {"annotations": complete}, drawn[1])
        assert stats == tuple(expected.stats)


def test_without_hotcoco_pycocotools_gives_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = make_truth(3)
    path = write_json(tmp_path / "truth.json", truth)
    expected = evaluate(path, make_detections(truth), 300)
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert evaluate(path, make_detections(truth), 300) == expected
    assert evaluation_module.can_evaluate()
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert not evaluation_module.can_evaluate()


def test_as_many_detections_count_as_the_test_kept(tmp_path: Path) -> None:
    """An image with one box, found by its detection 101 only."""
    truth = one_box_each()
    truth["annotations"] = truth["annotations"][:1]
    path = write_json(tmp_path / "truth.json", truth)
    wrong = {"image_id": 1, "category_id": 5, "bbox": [200, 200, 9, 9]}
    detections = [*(wrong | {"score": 0.9} for _ in range(100)), perfect((1,))[0] | {"score": 0.1}]
    standard, more = evaluate(path, detections), evaluate(path, detections, 300)
    assert (standard.AP, standard.scores["AR100"]) == (0.0, 0.0)
    assert pytest.approx(1 / 101) == more.AP
    assert more.scores["AR300"] == 1.0
    assert "AR300 1.000" in more.table
    assert "at most 300 of a class in an image count" in more.table
    assert evaluate(path, detections, 5).max_det == 100


def test_the_table_fits_100_columns_and_has_one_scale(tmp_path: Path) -> None:
    truth = make_truth(2, num_image=40)
    truth["categories"] = [{"id": i, "name": f"a class of birds {i}"} for i in range(1, 81)]
    for annotation in truth["annotations"]:
        annotation["category_id"] = 1 + annotation["id"] % 79
    evaluation = evaluate(write_json(tmp_path / "truth.json", truth), make_detections(truth))
    lines = evaluation.table.splitlines()
    assert max(map(len, lines)) <= 100
    for row in evaluation.classes:
        shown = "    -" if row.AP < 0 else f"{row.AP:.3f}"
        assert f"{row.name:<19} {shown}" in evaluation.table
    for name, value in evaluation.scores.items():
        assert f"{name:<5} {value:.3f}" in evaluation.table


def test_scores_are_written_by_name(tmp_path: Path) -> None:
    path = write_json(tmp_path / "truth.json", one_box_each())
    evaluation = evaluate(path, perfect((1, 3)))
    write_scores(tmp_path / "birds_scores.json", evaluation, "birds", "checkpoint-0003.safetensors")
    content = json.loads((tmp_path / "birds_scores.json").read_text())
    assert content["stats"] == evaluation.scores
    assert content["classes"] == [
        {"name": "cat", "AP": evaluation.AP, "AP50": evaluation.scores["AP50"], "num_box": 3, "num_image": 3}
    ]
    assert (content["image_set"], content["checkpoint"]) == ("birds", "checkpoint-0003.safetensors")
    assert (content["max_det"], content["num_image"], content["num_detection"]) == (100, 3, 2)
    assert sorted(os.listdir(tmp_path)) == ["birds_scores.json", "truth.json"]


def one_box_each(**changes: Any) -> dict[str, Any]:
    """Return three images with one box of 40 x 40 each, with the fewest fields allowed."""
    return {
        "images": [{"id": i} for i in (1, 2, 3)],
        "categories": [{"id": 5, "name": "cat"}],
        "annotations": [{"image_id": i, "category_id": 5, "bbox": [10, 10, 40, 40]} | changes for i in (1, 2, 3)],
    }


def perfect(image_ids: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"image_id": i, "category_id": 5, "bbox": [10, 10, 40, 40], "score": 0.9} for i in image_ids]


def test_annotations_without_id_area_and_iscrowd(tmp_path: Path) -> None:
    """All found: 1. 40 * 40 = 1600 lies between 32^2 and 96^2, so it is medium; there is nothing small or large."""
    path = write_json(tmp_path / "truth.json", one_box_each())
    stats = evaluate(path, perfect((1, 2, 3))).scores
    assert stats == {name: -1.0 if name[-1] in "sl" else 1.0 for name in stat_names()}


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
    assert result.scores["AR100"] == pytest.approx(2 / 3)
    assert (result.classes[0].name, result.classes[0].AP) == ("cat", result.AP)
    assert "cat   0.663 0.663       3" in result.table


def test_no_detections_score_zero(tmp_path: Path) -> None:
    path = write_json(tmp_path / "truth.json", make_truth())
    write_result(tmp_path / "result.json", [])
    for result in (evaluate(path, []), evaluate(path, tmp_path / "result.json")):
        assert set(result.stats) == {0.0}
        assert (result.classes[0].name, result.classes[0].AP) == ("class 3", 0.0)
        assert "nothing was detected" in result.table


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


def test_training_and_testing_import_no_evaluator() -> None:
    """Only the computation of AP does."""
    script = (
        "import sys; sys.modules['pycocotools'] = sys.modules['hotcoco'] = None\n"
        "import core.detection_module, core.inference, core.report.evaluation, detection_train, detection_test\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])
