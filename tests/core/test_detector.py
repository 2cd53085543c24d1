"""Detectors called from Python, from the command line and in tiles, without config file or annotations."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import detection_test
from config.load import load_config
from config.schema import Config
from core.detector import Detector, Found
from core.inference import test as run_test
from core.run.experiment import experiment_folder
from core.tiles import cut, join
from core.trained import find_trained
from core.weights.checkpoint import FORMAT_VERSION, load_weights, save_checkpoint
from tests.core.conftest import noise
from tests.small_config import DEMO, SMALL_NETWORK

Run = Callable[..., Config]
ONE_EPOCH = ("OptimizeParam.schedule.end_epoch=1", "OptimizeParam.schedule.lr_epoch=", "OptimizeParam.warmup.epoch=0")


@pytest.fixture
def experiment(run: Run) -> Path:
    """Train one epoch; the scores of its detections are low."""
    return experiment_folder(run(*ONE_EPOCH, "RpnParam.proposal.min_det_score=0.0"))


@pytest.fixture
def pictures(data_root: Path) -> list[Path]:
    return sorted((data_root / "demo" / "images" / "val").iterdir())


def equal(one: Found, other: Found) -> bool:
    return np.array_equal(one.boxes, other.boxes) and np.array_equal(one.scores, other.scores)


def test_a_detector_finds_what_the_test_finds(experiment: Path, pictures: list[Path]) -> None:
    (tested,) = run_test(find_trained(experiment))
    detector = Detector(experiment, device="cpu", min_score=0)
    for image, found in zip(tested.detections, detector(pictures), strict=True):
        assert len(found) == len(image.score) > 0
        np.testing.assert_array_equal(found.boxes[:, :2], image.bbox[:, :2])
        np.testing.assert_array_equal(found.boxes[:, 2:], image.bbox[:, 2:] + 1)  # exclusive corners
        np.testing.assert_array_equal(found.scores, image.score)
        assert [detector.class_names.index(name) + 1 for name in found.names] == image.cls.tolist()
    entries = json.loads(tested.result.read_text())
    assert detector(pictures).to_coco([1, 2, 3, 4]) == [
        {key: pytest.approx(value, rel=1e-5, abs=1e-3) for key, value in entry.items()} for entry in entries
    ]


def test_arrays_paths_and_pillow_images_are_the_same(experiment: Path, pictures: list[Path]) -> None:
    detector = Detector(experiment, device="cpu", min_score=0)
    with Image.open(pictures[0]) as image:
        array = np.asarray(image.convert("RGB"))
        by_pillow = detector(image)
    by_path, by_array = detector(str(pictures[0])), detector(array)
    assert equal(by_path, by_array)
    assert equal(by_path, by_pillow)
    grey = detector(array[:, :, 0])
    assert equal(grey, detector(np.repeat(array[:, :, :1], 3, axis=2)))


def test_batches_change_nothing_but_rounding(experiment: Path, pictures: list[Path]) -> None:
    one, three = (Detector(experiment, device="cpu", batch_image=n, min_score=0) for n in (1, 3))
    for single, batched in zip(one(pictures), three(pictures), strict=True):
        np.testing.assert_allclose(single.scores, batched.scores, rtol=1e-4)


def test_portrait_and_landscape_images_in_one_batch(experiment: Path) -> None:
    wide = ["ResizeParam.short=128", "ResizeParam.long=256"]
    one, three = (Detector(experiment, device="cpu", min_score=0, batch_image=n, settings=wide) for n in (1, 3))
    images = [noise(100, 200, 1), noise(200, 100, 2), noise(90, 180, 3), noise(256, 128, 4)]
    for single, batched, image in zip(one(images), three(images), images, strict=True):
        np.testing.assert_array_equal(batched.image, image)
        np.testing.assert_allclose(single.scores, batched.scores, rtol=1e-4)
        assert batched.boxes[:, 2].max() > 0.5 * image.shape[1]
        assert batched.boxes[:, 3].max() > 0.5 * image.shape[0]
        assert (batched.boxes[:, 2:] < np.array([image.shape[1], image.shape[0]]) + 1).all()


def test_min_score_and_settings(experiment: Path, pictures: list[Path]) -> None:
    every = Detector(experiment, device="cpu", min_score=0)(pictures[0])
    middle = float(np.median(every.scores))
    some = Detector(experiment, device="cpu", min_score=middle)(pictures[0])
    assert 0 < len(some) < len(every)
    assert some.scores.min() >= middle
    few = Detector(experiment, device="cpu", min_score=0, settings=["TestParam.max_det_per_image=5"])(pictures[0])
    assert len(few) == 5


def test_threads_take_turns(experiment: Path, pictures: list[Path]) -> None:
    detector = Detector(experiment, device="cpu", min_score=0)
    expected = detector(pictures)
    found: dict[int, list[Found]] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: detector(pictures)})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for several in found.values():
        assert all(equal(a, b) for a, b in zip(several, expected, strict=True))


def test_a_picture_has_one_panel(experiment: Path, pictures: list[Path]) -> None:
    found = Detector(experiment, device="cpu", min_score=0)(pictures[0])
    drawn = found.draw(min_score=0)
    height, width = found.image.shape[:2]
    assert drawn.shape[1] == pytest.approx(480 * width / max(height, width), abs=60)
    assert not np.array_equal(drawn, found.draw(min_score=1.0))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"expected uint8 .* got uint8 \(4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), r"expected uint8 .* got float32"),
        (np.zeros((0, 4, 3), np.uint8), r"expected uint8"),
    ],
)
def test_arrays_of_other_shapes_are_refused(experiment: Path, image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detector(experiment, device="cpu")(image)


def test_places_without_a_detector(experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: expected the folder of an experiment"):
        Detector(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*empty: train first"):
        Detector(tmp_path / "empty")
    with pytest.raises(ValueError, match="holds the momentum of a run, not weights"):
        Detector(next(experiment.glob("*.state.safetensors")))
    with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got 'tpu'"):
        Detector(experiment, device="tpu")
    with pytest.raises(ValueError, match="min_score: expected a number from 0 to 1"):
        Detector(experiment, device="cpu", min_score=2)


def test_one_checkpoint_file_is_enough(experiment: Path, pictures: list[Path], tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "birds.safetensors"
    alone.parent.mkdir()
    alone.write_bytes((experiment / "checkpoint-0001.safetensors").read_bytes())
    one, other = (Detector(source, device="cpu", min_score=0)(pictures[0]) for source in (alone, experiment))
    assert equal(one, other)


def test_a_checkpoint_of_before_needs_its_config(experiment: Path, pictures: list[Path], data_root: Path) -> None:
    path = experiment / "checkpoint-0001.safetensors"
    expected = Detector(experiment, device="cpu", min_score=0)(pictures[0])
    weights, progress = load_weights(path)
    save_checkpoint(experiment, "checkpoint-0001", weights, {}, progress)
    with pytest.raises(ValueError, match="without the description of their detector"):
        Detector(experiment, device="cpu")
    settings = [*SMALL_NETWORK, f"DatasetParam.data_root={data_root}", "RpnParam.proposal.min_det_score=0.0"]
    found = Detector(path, config=DEMO, device="cpu", min_score=0, settings=[*settings, "KvstoreParam.gpus=cpu"])(
        pictures[0]
    )
    assert equal(found, expected)
    assert FORMAT_VERSION == 3


def detect(*arguments: str | Path) -> int:
    return detection_test.main([str(argument) for argument in arguments])


def test_images_from_the_command_line(
    experiment: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found"
    status = detect(
        "--experiment", experiment, "--images", pictures[0].parent, "--out", out, "--min-score", 0, "--draw", 2
    )
    assert status == 0
    entries = json.loads((out / "detections.json").read_text())
    assert {entry["file_name"] for entry in entries} == set(map(str, pictures))
    expected = Detector(experiment, device="cpu", min_score=0)(pictures)
    assert [entry["score"] for entry in entries] == [score for found in expected for score in found.scores.tolist()]
    assert [entry["category"] for entry in entries] == [name for found in expected for name in found.names]
    assert sorted(path.name for path in out.iterdir()) == ["000001.jpg", "000002.jpg", "detections.json"]
    assert "detections in 4 images" in capsys.readouterr().out


def test_a_damaged_image_is_named_and_skipped(
    experiment: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    (folder / "deep").mkdir(parents=True)
    content = pictures[0].read_bytes()
    (folder / "a.jpg").write_bytes(content)
    (folder / "deep" / "a.jpg").write_bytes(content)
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "notes.txt").write_text("not an image")
    assert detect("--experiment", experiment, "--images", folder, "--min-score", 0) == 1
    error = capsys.readouterr().err
    assert f"skipped {folder / 'cut.jpg'}: cannot read image" in error
    assert "1 of 3 images could not be read" in error
    out = experiment / "detected"
    assert sorted(path.name for path in out.iterdir()) == ["a-2.jpg", "a.jpg", "detections.json"]
    assert {entry["image_id"] for entry in json.loads((out / "detections.json").read_text())} == {0, 2}


def test_a_video_gets_detections_by_frame(experiment: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (96, 64))
    for frame in range(5):
        writer.write(noise(64, 96, frame))
    writer.release()
    out = tmp_path / "found"
    assert detect("--experiment", experiment, "--images", path, "--out", out, "--min-score", 0) == 0
    entries = json.loads((out / "detections.json").read_text())
    assert {entry["frame"] for entry in entries} == set(range(5))
    drawn = cv2.VideoCapture(str(out / "clip-detected.mp4"))
    assert int(drawn.get(cv2.CAP_PROP_FRAME_COUNT)) == 5


def test_bad_paths_are_one_message_and_write_nothing(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    for path, error, message in (
        (tmp_path / "empty", FileNotFoundError, "empty holds no images or videos"),
        (tmp_path / "nowhere", FileNotFoundError, "does not exist, nor does a file match it"),
        (tmp_path / "clip.mp4", ValueError, "OpenCV has no decoder for this video, or it is damaged"),
    ):
        with pytest.raises(error, match=message):
            detect("--experiment", experiment, "--images", path)
    assert not (experiment / "detected").exists()
    with pytest.raises(ValueError, match="--overlap: expected 0 to less than the tile's 64"):
        detect("--experiment", experiment, "--images", tmp_path, "--tile", 64, "--overlap", 64)
    with pytest.raises(ValueError, match="expected a trained detector: --experiment DIR"):
        detect("--images", tmp_path)


def test_an_experiment_is_tested_with_no_other_option(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert detect("--experiment", experiment) == 0
    assert (experiment / "demo_val_result.json").is_file()
    assert "differs" not in capsys.readouterr().out
    last = json.loads((experiment / "log.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["image_set"], last["checkpoint"]) == ("test", "demo_val", "checkpoint-0001.safetensors")
    assert -1 <= last["AP"] <= 1


def test_a_report_says_where_the_detector_comes_from(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert detect("--experiment", experiment, "--report", "--min-score", 0.01) == 0
    page = experiment / "demo_val_report.html"
    assert f"wrote {page}" in capsys.readouterr().out
    text = page.read_text()
    for part in ("run on demo_val", "checkpoint-0001.safetensors", "trained on demo_train", "Confusion"):
        assert part in text


def test_a_report_needs_annotations_before_the_test(experiment: Path, pictures: list[Path], tmp_path: Path) -> None:
    bare = json.loads((pictures[0].parents[2] / "annotations" / "instances_val.json").read_text())
    del bare["annotations"]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    image_set = f"DatasetParam.image_set=(ImageSet('bare', '{tmp_path / 'bare.json'}', '{pictures[0].parent}'),)"
    with pytest.raises(ValueError, match="--report: bare has no annotations to compare"):
        detect("--experiment", experiment, "--set", image_set, "--report")
    assert not list(experiment.glob("bare*"))
    assert detect("--experiment", experiment, "--set", image_set, "--draw", 1) == 0
    (drawn,) = (experiment / "draw_bare").iterdir()
    with Image.open(drawn) as picture:
        assert picture.width < 900  # without ground truth one panel


def test_differences_are_printed_and_harmful_ones_refused(
    experiment: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detect("--experiment", experiment, "--set", "ResizeParam.short=256", "--set", "ResizeParam.long=256") == 0
    assert "differs: ResizeParam.short: trained with 128, tested with 256" in capsys.readouterr().out
    other_std = ("--set", "NormParam.std=(1.0,1.0,1.0)")
    with pytest.raises(ValueError, match=r"means something else .*\n  NormParam\.std: trained with"):
        detect("--experiment", experiment, *other_std)
    assert detect("--experiment", experiment, *other_std, "--allow-mismatch") == 0
    assert "differs: NormParam.std" in capsys.readouterr().out
    shared = [*SMALL_NETWORK, f"DatasetParam.data_root={data_root}", "KvstoreParam.gpus=cpu"]
    options = [word for one in [*shared, "RpnParam.proposal.min_det_score=0.0"] for word in ("--set", one)]
    anchors = ("--set", "RpnParam.anchor_generate.ratio=(0.4,1.0,2.0)")
    with pytest.raises(ValueError, match=r"RpnParam\.anchor_generate\.ratio: trained with"):
        detect("--config", DEMO, "--experiment", experiment, *options, *anchors)


def test_flip_finds_the_same_in_an_image_and_its_mirror(experiment: Path) -> None:
    every = ["TestParam.nms.thr=1.0", "TestParam.max_det_per_image=5000"]  # NMS breaks the ties of the two
    detector = Detector(experiment, device="cpu", min_score=0, flip=True, settings=every)
    image = noise(128, 112)  # of the size of the input: elsewhere corners are rounded in pixels of the input
    found, mirrored = detector(image), detector(np.ascontiguousarray(image[:, ::-1]))
    assert len(found) == len(mirrored) > 100
    back = mirrored.boxes.copy()
    back[:, [0, 2]] = image.shape[1] - mirrored.boxes[:, [2, 0]]
    rows, others = (
        np.column_stack([boxes, 100 * one.scores, one.class_ids])
        for boxes, one in ((found.boxes, found), (back, mirrored))
    )
    distance = np.abs(rows[:, None] - others[None]).max(axis=2)  # (D, D)
    assert distance.min(axis=1).max() < 0.01
    plain = Detector(experiment, device="cpu", min_score=0, settings=every)(image)
    assert len(found) > 1.5 * len(plain)


def test_tiles_cover_the_image() -> None:
    assert len(cut(600, 800, None, 64)) == 1
    assert len(cut(600, 600, 640, 64)) == 1
    tiles = cut(1000, 1500, 640, 64)
    covered = np.zeros((1000, 1500), int)
    for tile in tiles[1:]:
        assert (tile.height, tile.width) == (640, 640)
        covered[tile.top : tile.top + 640, tile.left : tile.left + 640] += 1
    assert covered.min() == 1
    lefts = sorted({tile.left for tile in tiles[1:]})
    assert all(right - left <= 640 - 64 for left, right in pairwise(lefts))
    assert (tiles[0].height, tiles[0].width) == (1000, 1500)


def test_an_object_across_a_cut_is_found_once() -> None:
    whole, left, right = cut(100, 180, 100, 20)
    part_left = np.array([[70, 20, 99, 60, 0.9, 1], [10, 10, 30, 30, 0.8, 1]], np.float32)  # cut at its right edge
    part_right = np.array([[0, 20, 40, 60, 0.7, 1]], np.float32)  # 80 to 120 in the image, cut at its left edge
    in_whole = np.array([[69, 19, 121, 61, 0.5, 1], [10, 11, 30, 31, 0.4, 1]], np.float32)
    found = join([(whole, in_whole), (left, part_left), (right, part_right)], (100, 180), thr=0.5, max_det=100)
    assert found[:, :5].tolist() == [
        [
            10,
            10,
            30,
            30,
            pytest.approx(0.8),
        ],
        [69, 19, 121, 61, pytest.approx(0.5)],
    ]
    other_class = in_whole.copy()
    other_class[:, 5] = 2  # suppresses nothing of class 1
    found = join([(whole, other_class), (left, part_left)], (100, 180), thr=0.5, max_det=100)
    assert len(found) == 4


def test_tiles_find_small_objects(experiment: Path) -> None:
    image = noise(160, 256)
    detector = Detector(experiment, device="cpu", min_score=0, settings=["TestParam.max_det_per_image=10"])
    whole, tiled = detector(image), detector(image, tile=128, overlap=32)
    assert not equal(whole, tiled)
    assert (tiled.boxes[:, 2] <= 256 + 1e-3).all()
    assert (tiled.boxes[:, 3] <= 160 + 1e-3).all()
    best = detector(image[:128, :128])
    assert tiled.scores.max() >= best.scores.max() - 1e-6


def test_load_config_knows_what_the_file_tests_on(data_root: Path) -> None:
    places = [f"DatasetParam.data_root={data_root}", "DatasetParam.image_set=demo_train"]
    config = load_config(DEMO, is_train=True, overrides=[*SMALL_NETWORK, *places])
    assert config.TestParam.image_set == ("demo_val",)


def test_pictures_never_overwrite_images(experiment: Path, pictures: list[Path], tmp_path: Path) -> None:
    content = pictures[0].read_bytes()
    for name in ("a/x.jpg", "a/x-2.jpg", "b/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folders = tmp_path / "a", tmp_path / "b"
    with pytest.raises(ValueError, match="a picture would overwrite the image"):
        detect("--experiment", experiment, "--images", *folders, "--out", folders[0])
    assert (tmp_path / "a" / "x.jpg").read_bytes() == content
    assert detect("--experiment", experiment, "--images", *folders, "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 3
