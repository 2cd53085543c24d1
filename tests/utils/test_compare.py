"""Comparison of experiments: numbers of two detectors, one of which finds more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.weights.checkpoint import Progress, epoch_stem, save_checkpoint
from utils import compare

NUM_IMAGE = 12
BOX = [10, 10, 40, 40]


def detections(images: range, score: float = 0.9) -> list[dict[str, Any]]:
    return [{"image_id": i, "category_id": 1 + i % 2, "bbox": BOX, "score": score} for i in images]


def write_test(folder: Path, entries: list[dict[str, Any]], max_det: int | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "birds_val_result.json").write_text(json.dumps(entries))
    if max_det is not None:
        (folder / "birds_val_scores.json").write_text(json.dumps({"max_det": max_det}))
    return folder


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """One bird in each of twelve images; even images have swifts (class 1), odd ones robins (class 2)."""
    annotations = [
        {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": BOX, "area": 1600, "iscrowd": 0}
        for i in range(1, NUM_IMAGE + 1)
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 99, "height": 99} for i in range(1, NUM_IMAGE + 1)],
        "categories": [{"id": 1, "name": "swift"}, {"id": 2, "name": "robin"}],
        "annotations": annotations,
    }
    path = tmp_path / "data" / "birds" / "annotations" / "instances_val.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    return tmp_path / "data"


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_what_one_finds_and_the_other_misses(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First: images 1 to 6, half of each class: AP 51 / 101. Second: images 2 to 12, all but one robin of six."""
    first = write_test(tmp_path / "first", detections(range(1, 7)))
    second = write_test(tmp_path / "second", detections(range(2, 13)))
    compare.main([str(first), str(second), "--data-root", str(data_root), "--resamples", "200"])
    printed = lines(capsys)
    AP, better = 51 / 101, (1 + 84 / 101) / 2  # recall 5 / 6 reaches the recall points 0 to 0.83
    assert printed[0] == "birds_val: 12 images, 12 boxes"
    assert f"first {AP:.3f} {AP:.3f} {AP:.3f} - {AP:.3f} -" in " ".join(printed)
    assert f"second {better:.3f}" in " ".join(printed)
    difference = next(line for line in printed if line.startswith("AP +"))
    assert difference.startswith(f"AP {better - AP:+.3f} (+")
    assert difference.endswith("larger")
    assert f"swift {AP:.3f} and 1.000 {1 - AP:+.3f}" in printed
    start = printed.index("found by second, missed by first: 6 boxes")
    assert printed[start + 1] == "classes: robin 3, swift 3" or printed[start + 1] == "classes: swift 3, robin 3"
    assert printed[start + 2] == "images: 7.jpg 1, 8.jpg 1, 9.jpg 1, 10.jpg 1, 11.jpg 1"
    start = printed.index("found by first, missed by second: 1 boxes")
    assert printed[start + 1 : start + 3] == ["classes: robin 1", "images: 1.jpg 1"]


def test_equal_results_do_not_differ(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_test(tmp_path / name / "run", detections(range(1, 7))) for name in ("a", "b", "c")]
    compare.main([*map(str, folders), "--data-root", str(data_root), "--resamples", "20"])
    printed = lines(capsys)
    assert printed.count("AP +0.000 (+0.000 to +0.000) no clear difference") == 2
    assert f"{folders[2]} minus {folders[0]}" in printed  # folders of one name are told apart by their paths


def test_a_score_can_be_chosen(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_test(tmp_path / "first", detections(range(1, 7), 0.4))
    second = write_test(tmp_path / "second", detections(range(1, 7), 0.8))
    arguments = [str(first), str(second), "--data-root", str(data_root), "--resamples", "20"]
    compare.main(arguments)
    assert "detections that count as found: first from 0.400, second from 0.800" in lines(capsys)
    compare.main([*arguments, "--min-score", "0.5"])
    assert "found by second, missed by first: 6 boxes" in lines(capsys)


def test_speed_size_and_limit_of_detections(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_test(tmp_path / "first", detections(range(1, 7)), max_det=300)
    second = write_test(tmp_path / "second", detections(range(1, 7)))
    steps = [{"step": s, "cls_loss": 1.0, "img_per_s": speed} for s, speed in ((10, 5.0), (20, 61.0), (30, 70.0))]
    (first / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    weights = {"a_weight": torch.zeros(300, 1000), "b_bias": torch.zeros(10_000)}
    save_checkpoint(first, epoch_stem(1), weights, {}, Progress(epoch=1, step=1, seed=0, experiment="first"))
    compare.main([str(first), str(second), "--data-root", str(data_root), "--resamples", "20"])
    printed = lines(capsys)
    assert any("AR300" in line for line in printed)
    assert "first 61.0 0.31M 1.2 MiB 6" in printed
    assert "second - - - 6" in printed


def test_refusals(data_root: Path, tmp_path: Path) -> None:
    first = write_test(tmp_path / "first", [])
    second = write_test(tmp_path / "second", [])
    both = [str(first), str(second)]
    root = ["--data-root", str(data_root)]
    for arguments, message in (
        ([str(first)], "two experiments or more"),
        ([*both, *root, "--min-score", "2"], "--min-score: expected a number from 0 to 1, got 2"),
        ([*both, *root, "--resamples", "0"], "--resamples: expected 1 or more, got 0"),
        ([*both, *root, "--image-set", "cats_val"], r"--image-set cats_val: .* tested on \['birds_val'\]"),
        ([str(first), str(tmp_path / "data")], "has no <image_set>_result.json: test it with detection_test.py"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.main(arguments)
    for arguments, message in (
        ([str(first), str(tmp_path / "none")], r"no folder .*none: name the folders of experiments"),
        ([*both, "--data-root", str(tmp_path)], "--data-root"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            compare.main(arguments)
    for folder in (first, second):
        (folder / "cats_val_result.json").write_text("[]")
    with pytest.raises(ValueError, match="choose one with --image-set"):
        compare.main(both)
    (second / "birds_val_result.json").unlink()
    (first / "cats_val_result.json").unlink()
    with pytest.raises(ValueError, match="test them on the same images"):
        compare.main(both)
