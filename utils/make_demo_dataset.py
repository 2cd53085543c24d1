"""Generate a small detection data set in COCO's format: coloured shapes on cluttered backgrounds.

    python3 utils/make_demo_dataset.py --out data/demo

writes the image sets demo_train and demo_val under the data root `data`. Shapes differ in size, rotation and
colour (which only hints at the class), occlude each other, and are truncated by the frame; bars and ellipses
between them are not labelled. Every image is a function of (size, seed, split, index): a larger data set
starts with the images of a smaller one.

H, W: image sides in pixels; h, w: sides of the window around one shape.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (u, v) -> inside; the shape fits the unit circle

SPLITS = ("train", "val")
MIN_SIZE = 32
MIN_VISIBLE = 0.4  # a shape of which less than this share is visible gets no box
EMPTY_EVERY = 25  # one of this many images has no labelled shape
SUPERSAMPLE = 3  # subpixels per pixel side, for smooth edges


def _edges_kept(u: np.ndarray, v: np.ndarray, count: int, distance: float) -> np.ndarray:
    """Return how many of `count` evenly rotated half-planes at `distance` from the centre contain each point."""
    angles = 2 * math.pi * np.arange(count) / count
    kept = np.zeros(np.broadcast_shapes(u.shape, v.shape), np.int8)
    for angle in angles:
        kept += u * math.cos(angle) + v * math.sin(angle) <= distance
    return kept


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * u + v * v <= 1


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return (np.minimum(u, v) <= 0.3) & (np.maximum(u, v) <= 0.95)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radius = u * u + v * v
    return (radius <= 1) & (radius >= 0.55**2)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= math.sqrt(0.5)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # a pentagram: the points outside at most one edge of its inner pentagon
    return _edges_kept(u, v, 5, math.cos(0.4 * math.pi)) >= 4


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _edges_kept(u, v, 3, 0.5) == 3


def _bar(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.abs(u) <= 1) & (np.abs(v) <= 0.06)


def _ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * u + (v / 0.35) ** 2 <= 1


CLASSES: dict[str, Outline] = {
    "circle": _circle,
    "cross": _cross,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
CLUTTER: tuple[Outline, ...] = (_bar, _bar, _ellipse)


@dataclass(frozen=True)
class Box:
    """A labelled shape: the tight box of its visible pixels, xyxy in pixels with inclusive corners."""

    category_id: int  # 1.. in the order of CLASSES
    xyxy: tuple[int, int, int, int]
    area: int  # visible pixels


def _background(rng: np.random.Generator, H: int, W: int) -> np.ndarray:
    """Return soft blotches at two scales around one colour, (H, W, 3) float32."""
    canvas = np.empty((H, W, 3), np.float32)
    canvas[:] = rng.uniform(60, 200) + rng.normal(0, 18, 3)
    for cells, strength in ((4, 24.0), (14, 12.0)):
        light = rng.normal(0, strength, (cells, cells, 1))
        tint = rng.normal(0, 0.4 * strength, (cells, cells, 3))
        canvas += cv2.resize((light + tint).astype(np.float32), (W, H), interpolation=cv2.INTER_CUBIC)
    return canvas


def _any_colour(rng: np.random.Generator) -> np.ndarray:
    """Return a random colour, RGB (3,), 0..255."""
    return rng.uniform(10, 245, 3)


def _class_colour(rng: np.random.Generator, category_id: int) -> np.ndarray:
    """Return RGB (3,), 0..255, of a hue near the class's own, which hints at the class; neighbours overlap."""
    hue = ((category_id - 1) / len(CLASSES) + rng.normal(0, 0.05)) % 1
    return 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 1), rng.uniform(0.35, 1)))


def _against(backdrop: np.ndarray, contrast: float, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """Return a sampled colour (3,) at least `contrast` (Euclidean) from the backdrop's mean, if one of 50 is."""
    mean = backdrop.reshape(-1, 3).mean(0)  # (h, w, 3) -> (h*w, 3)
    for _ in range(50):
        colour = draw()
        if np.linalg.norm(colour - mean) >= contrast:
            break
    return colour


def _paint(
    rng: np.random.Generator,
    canvas: np.ndarray,
    outline: Outline,
    centre: tuple[float, float],
    radius: float,
    draw_colour: Callable[[], np.ndarray],
    contrast: float,
) -> tuple[np.ndarray, int]:
    """Paint a rotated shape on the canvas (H, W, 3).

    Returns the pixels it covers, (H, W) bool, and the number that it would cover on an unbounded canvas.
    """
    H, W = canvas.shape[:2]
    left, top = (math.floor(c - radius) for c in centre)
    side = math.ceil(2 * radius) + 2
    angle = rng.uniform(0, 2 * math.pi)
    sub = (np.arange(side * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    x = (left + sub - centre[0])[None, :] / radius
    y = (top + sub - centre[1])[:, None] / radius
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    inside = outline(u, v).reshape(side, SUPERSAMPLE, side, SUPERSAMPLE)
    coverage = inside.mean((1, 3), dtype=np.float32)  # (h, w), share of each pixel

    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + side, W), min(top + side, H)  # exclusive
    seen = coverage[y1 - top : y2 - top, x1 - left : x2 - left]
    patch = canvas[y1:y2, x1:x2]
    shade = rng.uniform(-30, 30) * u[::SUPERSAMPLE, ::SUPERSAMPLE][y1 - top : y2 - top, x1 - left : x2 - left]
    paint = _against(patch, contrast, draw_colour) + shade[..., None]
    patch += seen[..., None] * (paint - patch)
    covered = np.zeros((H, W), bool)
    covered[y1:y2, x1:x2] = seen >= 0.5
    return covered, int((coverage >= 0.5).sum())


def _free_place(
    rng: np.random.Generator, margin: float, W: int, H: int, taken: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Return the one of four random places furthest from those taken: shapes overlap, but rarely hide each other."""
    places = [(rng.uniform(margin, W - margin), rng.uniform(margin, H - margin)) for _ in range(4)]
    return max(places, key=lambda place: min((math.dist(place, other) for other in taken), default=0.0))


def _tight_box(category_id: int, visible: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    xyxy = (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))
    return Box(category_id, xyxy, int(visible.sum()))


def draw_scene(rng: np.random.Generator, size: int, num_shape: int) -> tuple[np.ndarray, list[Box]]:
    """Draw an image with `num_shape` labelled shapes, sides within 15% of `size`.

    Returns the image (H, W, 3) uint8 RGB and the boxes of the shapes that remain visible, in drawing order.
    """
    H, W = (round(size * s) for s in rng.uniform(0.85, 1.15, 2))
    canvas = _background(rng, H, W)
    for _ in range(rng.integers(3, 8)):
        centre = (rng.uniform(0, W), rng.uniform(0, H))
        outline, radius = CLUTTER[rng.integers(len(CLUTTER))], size * rng.uniform(0.05, 0.3)
        _paint(rng, canvas, outline, centre, radius, partial(_any_colour, rng), 20)

    outlines = list(CLASSES.values())
    centres: list[tuple[float, float]] = []
    drawn: list[tuple[int, np.ndarray, int]] = []  # category id, visible pixels, pixels of the whole shape
    for category_id in rng.integers(1, len(outlines) + 1, num_shape).tolist():
        radius = size / 2 * math.exp(rng.uniform(math.log(0.2), math.log(0.52)))
        centre = _free_place(rng, 0.8 * radius, W, H, centres)
        centres.append(centre)
        draw_colour = partial(_class_colour, rng, category_id)
        covered, whole = _paint(rng, canvas, outlines[category_id - 1], centre, radius, draw_colour, 75)
        for _, visible, _ in drawn:
            visible &= ~covered
        drawn.append((category_id, covered, whole))

    boxes = [_tight_box(c, seen) for c, seen, whole in drawn if seen.sum() >= max(1, MIN_VISIBLE * whole)]
    canvas += rng.normal(0, rng.uniform(2, 7), canvas.shape)
    return canvas.clip(0, 255).round().astype(np.uint8), boxes


def _annotation(annotation_id: int, image_id: int, box: Box) -> dict[str, object]:
    x1, y1, x2, y2 = box.xyxy
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": box.category_id,
        "bbox": [x1, y1, x2 - x1 + 1, y2 - y1 + 1],
        "area": box.area,
        "iscrowd": 0,
        "segmentation": [],
    }


def _make_split(out: Path, split: str, count: int, size: int, seed: int) -> Path:
    image_dir = out / "images" / split
    image_dir.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in range(count):
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        empty = index % EMPTY_EVERY == EMPTY_EVERY - 1
        image, boxes = draw_scene(rng, size, 0 if empty else int(rng.integers(1, 6)))
        file_name = f"{index + 1:06d}.jpg"
        Image.fromarray(image).save(image_dir / file_name, quality=92)
        images.append({"id": index + 1, "file_name": file_name, "height": image.shape[0], "width": image.shape[1]})
        annotations += [_annotation(len(annotations) + i, index + 1, box) for i, box in enumerate(boxes, 1)]

    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    content = {
        "info": {"description": f"Necklace demo shapes, {split}, size {size}, seed {seed}"},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    path = out / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # written last and renamed into place: the images of an existing json are complete
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)
    return path


def make_demo_dataset(out: str | Path, train: int, val: int, size: int, seed: int) -> list[Path]:
    """Write <out>/images/{train,val}/*.jpg and <out>/annotations/instances_{train,val}.json.

    `train` and `val` count images, `size` is their typical side in pixels. Boxes are COCO's [x, y, w, h] of
    the visible pixels, w = x2 - x1 + 1. Equal arguments give equal bytes. Files of an earlier call are replaced.

    Returns the paths of the two json files. Raises ValueError for counts below 1, a size below 32 or a
    negative seed, OSError if the folder cannot be written.
    """
    for name, value, least in (
        ("train", train, 1),
        ("val", val, 1),
        ("size", size, MIN_SIZE),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"--{name} is {value}; expected at least {least}")
    return [_make_split(Path(out), split, n, size, seed) for split, n in zip(SPLITS, (train, val), strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a small data set of shapes in COCO's format.")
    parser.add_argument("--out", default="data/demo", help="folder to write (default: %(default)s)")
    parser.add_argument("--train", type=int, default=500, help="training images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=100, help="validation images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=144, help="typical side in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        paths = make_demo_dataset(options.out, options.train, options.val, options.size, options.seed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    for path in paths:
        print(path)


if __name__ == "__main__":
    main()
