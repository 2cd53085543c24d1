from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.schema import ResizeParam
from models.NASFPN.input import RandResizeCrop2DImageBbox, ResizeCrop2DImageBbox


class Draws:
    """Stand-in for a random generator: uniform() returns these fractions of the range in order."""

    def __init__(self, *fractions: float) -> None:
        self.fractions = list(fractions)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * self.fractions.pop(0)


def ramp(height: int, width: int) -> np.ndarray:
    """Return an image with the row in channel 0 and the column in channel 1, which identify each pixel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.zeros_like(x)], axis=2).astype(np.uint8)


def make_record(height: int, width: int, boxes: Sequence[Sequence[float]] = (), rng: Any = None) -> dict[str, Any]:
    gt_bbox = np.array(boxes, np.float32).reshape(-1, 5)
    return {"image": ramp(height, width), "gt_bbox": gt_bbox, "h": height, "w": width, "rng": rng}


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (427, 640, (85, 128)),  # 427 * 0.2 = 85.4
        (640, 427, (128, 85)),
        (50, 49, (128, 125)),  # 49 * 2.56 = 125.44
        (1, 3000, (1, 128)),  # 0.04 rows, but at least one
        (97, 49, (128, 64)),  # 49 * 1.3195 = 64.66
    ],
)
def test_the_longer_side_becomes_the_size(height: int, width: int, expected: tuple[int, int]) -> None:
    record = make_record(height, width)
    ResizeCrop2DImageBbox(ResizeParam(short=128, long=128)).apply(record)
    assert record["image"].shape == (*expected, 3)
    assert record["im_info"].tolist() == [*expected, pytest.approx(128 / max(height, width))]


@pytest.mark.parametrize("size", [128, 640, 1024, 1280])
def test_rounding_never_costs_a_pixel_of_the_longer_side(size: int) -> None:
    lost = [side for side in range(1, 400) if int(side * (size / side)) != size]
    assert lost  # 49 * (640 / 49) < 640
    for side in lost[:20]:
        for height, width in ((1, side), (side, 1)):
            record = make_record(height, width)
            ResizeCrop2DImageBbox(ResizeParam(short=size, long=size)).apply(record)
            assert max(record["image"].shape) == size


def test_test_boxes_are_scaled_and_clipped() -> None:
    record = make_record(100, 200, [[10, 20, 199, 99, 3], [199, 99, 199, 99, 1]])
    ResizeCrop2DImageBbox(ResizeParam(short=128, long=128)).apply(record)  # scale 0.64: 64 x 128
    np.testing.assert_allclose(record["gt_bbox"], [[6.4, 12.8, 127, 63, 3], [127, 63, 127, 63, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (100, 200, (128, 256)),  # min(384 / 200, 128 / 100) = 1.28: the shorter side decides
        (100, 400, (96, 384)),  # min(384 / 400, 128 / 100) = 0.96: the longer side decides
        (400, 100, (384, 96)),
    ],
)
def test_an_oblong_input_holds_the_whole_image(height: int, width: int, expected: tuple[int, int]) -> None:
    record = make_record(height, width)
    ResizeCrop2DImageBbox(ResizeParam(short=128, long=384)).apply(record)
    assert record["image"].shape == (*expected, 3)


def test_random_crop_of_an_enlarged_image() -> None:
    """u = 1.25: int(1.25 * 128) = 160, scale 160 / 80 = 2, 160 x 120. Offset int(32 * 0.5) = 16 down; 120 fits."""
    boxes = [[10, 10, 20, 20, 1], [0, 0, 30, 70, 2], [0, 0, 7, 7, 3], [0, 0, 8, 8, 4], [59, 79, 59, 79, 5]]
    record = make_record(80, 60, boxes, Draws(1.0, 0.5, 0.9))
    param = ResizeParam(short=128, long=128, scale_min=0.8, scale_max=1.25)
    RandResizeCrop2DImageBbox(param).apply(record)
    assert record["image"].shape == (128, 120, 3)
    assert record["im_info"].tolist() == [128, 120, 2]
    assert record["gt_bbox"].tolist() == [
        [20, 4, 40, 24, 1],  # doubled, 16 up
        [0, 0, 60, 124, 2],  # its top is cut
        # rows 0 to 14 lie above the window
        [0, 0, 16, 0, 4],  # rows 0 to 16: one row is left
        # row 158 - 16 = 142 lies below the window
    ]
    assert record["image"][0, 0, 0] == 8  # row 16 of the enlarged image is row 7.75 of the file
    assert record["image"].flags["C_CONTIGUOUS"]


def test_random_crop_of_a_reduced_image_keeps_all_of_it() -> None:
    """u = 0.8: int(0.8 * 128) = 102, scale 102 / 200, 51 x 102, no crop."""
    record = make_record(100, 200, [[0, 0, 199, 99, 1]], Draws(0.0, 0.9, 0.9))
    RandResizeCrop2DImageBbox(ResizeParam(short=128, long=128, scale_min=0.8, scale_max=1.2)).apply(record)
    assert record["image"].shape == (51, 102, 3)
    assert record["im_info"].tolist() == [51, 102, pytest.approx(0.51)]
    assert record["gt_bbox"].tolist() == [[0, 0, 101, 50, 1]]


def test_random_crop_moves_boxes_with_pixels() -> None:
    """Scale 1 for u = 1: the window's pixels hold their original rows and columns."""
    boxes = [[40, 60, 49, 69, 1], [0, 60, 4, 69, 2], [133, 60, 149, 69, 3], [0, 60, 5, 69, 4], [132, 60, 149, 69, 5]]
    record = make_record(200, 150, boxes, Draws(1.0, 0.5, 0.25))
    RandResizeCrop2DImageBbox(ResizeParam(short=128, long=128, scale_min=0.5, scale_max=200 / 128)).apply(record)
    top, left = 36, 5  # int(72 * 0.5), int(22 * 0.25): rows 36 to 163, columns 5 to 132
    assert record["image"].shape == (128, 128, 3)
    assert record["image"][0, 0].tolist() == [top, left, 0]
    assert record["gt_bbox"].tolist() == [[35, 24, 44, 33, 1], [0, 24, 0, 33, 4], [127, 24, 127, 33, 5]]


def test_a_crop_may_leave_no_box() -> None:
    record = make_record(100, 100, [[0, 0, 3, 3, 1]], Draws(1.0, 0.99, 0.99))
    RandResizeCrop2DImageBbox(ResizeParam(short=128, long=128, scale_min=1, scale_max=2)).apply(record)
    assert record["gt_bbox"].shape == (0, 5)


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    short=st.sampled_from([16, 32]),
    seed=st.integers(0, 10**6),
    square=st.booleans(),
)
def test_whatever_is_drawn_the_crop_fits_and_boxes_lie_inside(
    height: int, width: int, short: int, seed: int, square: bool
) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, width, (8, 2)), rng.integers(0, height, (8, 2))
    x.sort(axis=1)
    y.sort(axis=1)
    boxes = np.column_stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1], np.ones(8)])
    record = make_record(height, width, boxes.tolist(), rng)
    long = short if square else 2 * short
    RandResizeCrop2DImageBbox(ResizeParam(short=short, long=long, scale_min=0.1, scale_max=3)).apply(record)
    h, w = record["image"].shape[:2]
    limit = (long, short) if height >= width else (short, long)
    assert 1 <= h <= limit[0]
    assert 1 <= w <= limit[1]
    assert record["im_info"][:2].tolist() == [h, w]
    x1, y1, x2, y2 = record["gt_bbox"][:, :4].T
    assert ((x1 >= 0) & (x1 <= x2) & (x2 <= w - 1)).all()
    assert ((y1 >= 0) & (y1 <= y2) & (y2 <= h - 1)).all()
