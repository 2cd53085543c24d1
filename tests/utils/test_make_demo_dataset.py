"""The demo data set: outlines, boxes of the visible pixels, and files that pycocotools reads."""

import colorsys
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from utils import make_demo_dataset as demo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    demo.make_demo_dataset(out, train=50, val=10, size=96, seed=3)
    return out


def content(out: Path, split: str) -> dict:
    return json.loads((out / "annotations" / f"instances_{split}.json").read_text())


@pytest.mark.parametrize(
    "name, area",
    [
        ("circle", math.pi),
        ("cross", 2 * 1.9 * 0.6 - 0.6**2),  # two bars of 1.9 x 0.6, with their common square counted once
        ("ring", math.pi * (1 - 0.55**2)),
        ("square", 2.0),
        # ten triangles from the centre: an outer corner (radius 1) and an inner one (radius cos 72 / cos 36).
        ("star", 10 * 0.5 * math.cos(0.4 * math.pi) / math.cos(0.2 * math.pi) * math.sin(0.2 * math.pi)),
        ("triangle", 3 * math.sqrt(3) / 4),
    ],
)
def test_outline_has_its_area_and_fits_the_unit_circle(name: str, area: float) -> None:
    grid = (np.arange(1200) + 0.5) / 600 - 1
    u, v = grid[None, :], grid[:, None]
    inside = demo.CLASSES[name](u, v)
    assert inside.mean() * 4 == pytest.approx(area, rel=5e-3)
    reach = np.sqrt(u * u + v * v)[inside].max()
    assert 0.98 < reach <= 1


def test_paint_reports_covered_pixels_and_whole_size() -> None:
    canvas = np.full((40, 60, 3), 100, np.float32)
    rng = np.random.default_rng(0)
    red = np.array([250.0, 0, 0])
    covered, whole = demo._paint(rng, canvas, demo._circle, (60.0, 20.0), 10.0, lambda: red, 75)
    # a circle centred on the right border: its left half is visible, columns 50..59 and rows 10..29
    assert whole == pytest.approx(math.pi * 100, rel=0.02)
    assert covered.sum() == pytest.approx(whole / 2, rel=0.02)
    assert demo._tight_box(1, covered).xyxy == (50, 10, 59, 29)
    changed = np.abs(canvas - 100).max(2) > 0
    assert (changed & covered).sum() == covered.sum()
    assert not changed[:, :49].any()
    assert not changed[:9].any()


@pytest.mark.parametrize(
    "columns, expected",
    [
        (5, [(5, 0, 9, 9), (0, 0, 4, 9)]),  # half of the first shape is visible: its box covers that
        (6, [(6, 0, 9, 9), (0, 0, 5, 9)]),  # 40 of 100 pixels are just enough
        (7, [(0, 0, 6, 9)]),  # 30 are not
    ],
)
def test_hidden_shapes_lose_their_box(
    monkeypatch: pytest.MonkeyPatch, columns: int, expected: list[tuple[int, ...]]
) -> None:
    first, second = np.zeros((2, 40, 40), bool)
    first[:10, :10] = True
    second[:10, :columns] = True
    shapes = iter([first, second])

    def paint(rng: object, canvas: np.ndarray, outline: object, *_: object) -> tuple[np.ndarray, int]:
        if outline in demo.CLUTTER:
            return np.ones(canvas.shape[:2], bool), 0
        mask = next(shapes)
        return mask.copy(), int(mask.sum())

    monkeypatch.setattr(demo, "_paint", paint)
    _, boxes = demo.draw_scene(np.random.default_rng(0), 40, 2)
    assert [box.xyxy for box in boxes] == expected
    assert boxes[-1].area == 10 * columns


def test_colour_hints_at_the_class() -> None:
    rng = np.random.default_rng(0)
    for category_id in range(1, len(demo.CLASSES) + 1):
        hues = np.array([colorsys.rgb_to_hsv(*(demo._class_colour(rng, category_id) / 255))[0] for _ in range(200)])
        away = (hues - (category_id - 1) / len(demo.CLASSES) + 0.5) % 1 - 0.5  # on the circle of hues
        assert abs(away.mean()) < 0.02
        assert 0.04 < away.std() < 0.06  # neighbours are 1 / 6 apart


def test_background_clutter_has_no_box() -> None:
    image, boxes = demo.draw_scene(np.random.default_rng(0), 64, 0)
    assert boxes == []
    assert image.dtype == np.uint8
    assert image.std() > 5


@pytest.mark.parametrize("split, count", [("train", 50), ("val", 10)])
def test_files_agree_with_each_other(made: Path, split: str, count: int) -> None:
    coco = COCO(str(made / "annotations" / f"instances_{split}.json"))
    assert len(coco.imgs) == count
    assert len(list((made / "images" / split).iterdir())) == count
    assert [c["name"] for c in coco.loadCats(sorted(coco.cats))] == sorted(demo.CLASSES)
    for entry in coco.imgs.values():
        with Image.open(made / "images" / split / entry["file_name"]) as file:
            assert file.size == (entry["width"], entry["height"])
    assert len(coco.anns) > count
    for item in coco.anns.values():
        x, y, w, h = item["bbox"]
        entry = coco.imgs[item["image_id"]]
        assert x >= 0
        assert y >= 0
        assert x + w <= entry["width"]
        assert y + h <= entry["height"]
        assert 0 < item["area"] <= w * h
        assert (item["iscrowd"], item["segmentation"]) == (0, [])


def test_variety(made: Path) -> None:
    data = content(made, "train")
    assert {item["category_id"] for item in data["annotations"]} == set(range(1, len(demo.CLASSES) + 1))
    sides = {(entry["height"], entry["width"]) for entry in data["images"]}
    assert len(sides) > 25
    assert 0.8 * 96 < min(min(s) for s in sides) < max(max(s) for s in sides) < 1.2 * 96
    widths = [item["bbox"][2] for item in data["annotations"]]
    assert min(widths) < 0.2 * 96
    assert max(widths) > 0.35 * 96
    with_boxes = {item["image_id"] for item in data["annotations"]}
    assert {entry["id"] for entry in data["images"]} - with_boxes == {25, 50}


def test_equal_arguments_give_equal_bytes(made: Path, tmp_path: Path) -> None:
    demo.make_demo_dataset(tmp_path, train=50, val=10, size=96, seed=3)
    files = sorted(path.relative_to(made) for path in made.rglob("*.*"))
    assert len(files) == 62
    for path in files:
        assert (tmp_path / path).read_bytes() == (made / path).read_bytes(), path


def test_a_smaller_set_is_the_start_of_a_larger_one(made: Path, tmp_path: Path) -> None:
    demo.make_demo_dataset(tmp_path / "small", train=3, val=1, size=96, seed=3)
    demo.make_demo_dataset(tmp_path / "other", train=1, val=1, size=96, seed=4)
    small = content(tmp_path / "small", "train")
    assert small["images"] == content(made, "train")["images"][:3]
    assert small["annotations"] == content(made, "train")["annotations"][: len(small["annotations"])]
    pictures = [
        (folder / "images" / split / "000001.jpg").read_bytes()
        for folder in (tmp_path / "small", tmp_path / "other")
        for split in ("train", "val")
    ]
    assert len(set(pictures)) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": 0}, "--train is 0; expected at least 1"),
        ({"val": -1}, "--val is -1"),
        ({"size": 31}, "--size is 31; expected at least 32"),
        ({"seed": -1}, "--seed is -1; expected at least 0"),
    ],
)
def test_refuses(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.make_demo_dataset(tmp_path / "demo", **{"train": 1, "val": 1, "size": 64, "seed": 0, **change})
    assert not (tmp_path / "demo").exists()


def test_smallest_size_works(tmp_path: Path) -> None:
    demo.make_demo_dataset(tmp_path, train=24, val=1, size=demo.MIN_SIZE, seed=0)
    assert len(content(tmp_path, "train")["annotations"]) > 24


def test_runs_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, "utils/make_demo_dataset.py", "--out", str(tmp_path / "demo"), "--size", "64"]
    done = subprocess.run([*command, "--train", "2", "--val", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "demo" / "annotations"
    assert done.stdout.split() == [str(folder / "instances_train.json"), str(folder / "instances_val.json")]


def test_command_line_reports_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--train is 0"):
        demo.main(["--out", str(tmp_path), "--train", "0"])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=str(tmp_path / "file")):
        demo.main(["--out", str(tmp_path / "file"), "--train", "1", "--val", "1"])
