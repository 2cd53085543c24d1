"""Drawings: positions of boxes, labels and panels, detections left out, and invalid arguments."""

import itertools

import numpy as np
import pytest

from core.report import draw

FLAT = (90, 91, 92)  # a colour of the image alone
NAMES = ("cat", "dog")
NO_GT, NO_DET = np.zeros((0, 5)), np.zeros((0, 6))


def flat(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), FLAT, np.uint8)


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return x1, y1, x2, y2 (inclusive) of the pixels that are set."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def panels(drawing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two panels of a drawing whose image is FLAT at its corners."""
    x1, y1, x2, y2 = extent((drawing == FLAT).all(2))
    middle = (x1 + x2) // 2
    left, right = drawing[y1 : y2 + 1, : middle + 1], drawing[y1 : y2 + 1, middle + 1 : x2 + 1]
    return left[:, x1 : extent((left == FLAT).all(2))[2] + 1], right[:, extent((right == FLAT).all(2))[0] :]


def outline(panel: np.ndarray, index: int) -> tuple[int, int, int, int]:
    """Return the extent of the class's box; its label has the same colour, is above it and narrower."""
    mask = (panel == draw.class_colour(index)).all(2)
    x1, _, x2, y2 = extent(mask)
    long_rows = np.flatnonzero(mask[:, x1 : x2 + 1].mean(1) > 0.95)
    return x1, int(long_rows[0]), x2, y2


@pytest.mark.parametrize(
    "side, box, expected",
    [
        (480, (100, 200, 299, 399), (100, 200, 299, 399)),
        # ten times larger; the inclusive corner 29 covers the pixels 290..299
        (48, (10, 20, 29, 39), (100, 200, 299, 399)),
    ],
)
def test_boxes_are_drawn_at_their_pixels(side: int, box: draw.Rectangle, expected: draw.Rectangle) -> None:
    gt = np.array([[*box, 1]])
    det = np.array([[*box, 0.9, 2]])
    left, right = panels(draw.draw_detections(flat(side, side), gt, det, NAMES))
    assert left.shape == right.shape == (480, 480, 3)
    assert outline(left, 1) == expected
    assert outline(right, 2) == expected
    assert not (left == draw.class_colour(2)).all(2).any()
    assert not (right == draw.class_colour(1)).all(2).any()


def test_large_images_keep_their_size() -> None:
    left, _ = panels(draw.draw_detections(flat(700, 500), NO_GT, NO_DET, NAMES))
    assert left.shape == (700, 500, 3)


def test_low_scores_and_padding_are_left_out() -> None:
    det = np.array([[10, 10, 200, 200, 0.3, 1], [250, 250, 400, 400, 0.29, 2], [5, 5, 90, 90, 0.9, 0]])
    gt = np.array([[-1.0, -1, -1, -1, -1]])
    left, right = panels(draw.draw_detections(flat(480, 480), gt, det, NAMES))
    assert (left == FLAT).all()
    assert (right == draw.class_colour(1)).all(2).any()
    assert (right[240:, 240:] == FLAT).all()
    _, right = panels(draw.draw_detections(flat(480, 480), gt, det, NAMES, min_score=0.2))
    assert (right[240:, 240:] == draw.class_colour(2)).all(2).any()


def test_legend_names_the_classes_that_occur() -> None:
    def legend_height(names: int) -> int:
        gt = np.array([[10, 10, 60, 60, k] for k in range(1, names + 1)]).reshape(-1, 5)
        drawing = draw.draw_detections(flat(480, 480), gt, NO_DET, ["a long class name"] * 80)
        legend = drawing[extent((drawing == FLAT).all(2))[3] + 10 :]
        shown = [k for k in range(1, 81) if (legend == draw.class_colour(k)).all(2).any()]
        assert shown == list(range(1, names + 1))
        return legend.shape[0]

    assert legend_height(30) > legend_height(1) >= legend_height(0)


def test_image_is_not_changed_and_odd_boxes_are_drawn() -> None:
    image = flat(100, 100)
    odd = np.array([[-50, -50, 500, 500, 1], [60, 60, 40, 40, 2], [900, 900, 950, 950, 1]])
    drawing = draw.draw_detections(image, odd, NO_DET, NAMES)
    assert drawing.dtype == np.uint8
    assert (image == FLAT).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (700, 3)])
def test_extreme_shapes(shape: tuple[int, int]) -> None:
    drawing = draw.draw_detections(flat(*shape), np.array([[0, 0, 0, 0, 1]]), NO_DET, NAMES)
    assert min(drawing.shape[:2]) > 40


AREA, SIZE = (200, 100), (40, 10)
BOX = (50, 30, 150, 60)


@pytest.mark.parametrize(
    "box, taken, expected",
    [
        (BOX, [], (50, 20, 90, 30)),  # above
        (BOX, [(60, 0, 80, 25)], (50, 60, 90, 70)),  # below
        (BOX, [(60, 0, 80, 25), (60, 65, 80, 90)], (50, 30, 90, 40)),  # inside, at the top
        (BOX, [(40, 0, 100, 100)], (110, 20, 150, 30)),  # above, flush right
        (BOX, [(0, 0, 200, 100)], (50, 20, 90, 30)),  # no free place: above
        ((50, 4, 150, 60), [], (50, 0, 90, 10)),  # moved into the picture
        ((180, 30, 199, 60), [], (160, 20, 200, 30)),
    ],
)
def test_label_takes_the_first_free_place(
    box: draw.Rectangle, taken: list[draw.Rectangle], expected: draw.Rectangle
) -> None:
    assert draw._place_label(box, SIZE, AREA, taken) == expected


def test_colours_differ() -> None:
    colours = np.array([draw.class_colour(k) for k in range(1, 81)], float)
    distance = [np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)]
    assert min(distance) > 5
    neighbours = np.linalg.norm(np.diff(colours, axis=0), axis=1)
    assert neighbours.min() > 100


@pytest.mark.parametrize(
    "image, gt, det, message",
    [
        (
            flat(9, 9).astype(float),
            NO_GT,
            NO_DET,
            r"image: expected uint8 \(H, W, 3\) RGB, got float64 \(9, 9, 3\)",
        ),
        (flat(9, 9)[..., 0], NO_GT, NO_DET, r"image: .* got uint8 \(9, 9\)"),
        (flat(9, 9), np.zeros((1, 4)), NO_DET, r"gt: expected shape \(n, 5\), got \(1, 4\)"),
        (flat(9, 9), NO_GT, np.zeros((2, 5)), r"det: expected shape \(n, 6\), got \(2, 5\)"),
        (flat(9, 9), np.array([[0, 0, np.nan, 1, 1]]), NO_DET, "gt: a box, score or class is not finite"),
        (flat(9, 9), NO_GT, np.array([[0, 0, 1, 1, 0.5, 3]]), "det: class 3, but class_names has 2 names"),
    ],
)
def test_refuses(image: np.ndarray, gt: np.ndarray, det: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw.draw_detections(image, gt, det, NAMES)
