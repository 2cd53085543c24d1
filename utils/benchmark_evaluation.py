"""Benchmark COCO's evaluation: hotcoco beside pycocotools on generated boxes, and whether their arrays are equal.

    python3 utils/benchmark_evaluation.py
    python3 utils/benchmark_evaluation.py --images 500 --detections 50000 --repeat 3

Both receive the same columns of numbers. The time to read the files, which is the same for both, is printed too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.cli import run
from core.report.coco_files import FoundBoxes, Truth, read_found, read_truth
from core.report.evaluation import accumulate_hotcoco, accumulate_pycocotools

CLASSES = 80
TRUE_PER_IMAGE = 7  # as in COCO
SIDES = (640, 480)  # width and height of every image
MAX_DETS = (1, 10, 100)

Arrays = tuple[np.ndarray, np.ndarray]  # precision and recall
Accumulate = Callable[[Truth, FoundBoxes, tuple[int, int, int]], Arrays]


def generate(folder: Path, num_image: int, num_detection: int) -> tuple[Path, Path]:
    """Write an annotation file and a result file: half of the detections are true boxes moved a little."""
    rng = np.random.default_rng(0)
    num_true = TRUE_PER_IMAGE * num_image
    image, category = rng.integers(1, num_image + 1, num_true), rng.integers(1, CLASSES + 1, num_true)
    bbox = _random_boxes(rng, num_true)  # x, y, w, h
    crowd = rng.random(num_true) < 0.01
    rows = zip(image.tolist(), category.tolist(), bbox.tolist(), crowd.astype(int).tolist(), strict=True)
    truth = {
        "images": [{"id": i, "width": SIDES[0], "height": SIDES[1]} for i in range(1, num_image + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": c}
            for n, (i, k, box, c) in enumerate(rows, start=1)
        ],
    }
    source = rng.integers(0, num_true, num_detection // 2)
    moved = bbox[source] + rng.normal(0, 0.08, (len(source), 4)) * np.tile(bbox[source, 2:], 2)
    moved[:, 2:] = np.maximum(moved[:, 2:], 1)
    num_random = num_detection - len(source)
    found_image = np.concatenate([image[source], rng.integers(1, num_image + 1, num_random)])
    found_category = np.concatenate([category[source], rng.integers(1, CLASSES + 1, num_random)])
    found_bbox = np.concatenate([moved, _random_boxes(rng, num_random)]).round(2)
    score = rng.random(num_detection).round(4)  # many are equal
    columns = (found_image.tolist(), found_category.tolist(), found_bbox.tolist(), score.tolist())
    found = [{"image_id": i, "category_id": k, "bbox": box, "score": s} for i, k, box, s in zip(*columns, strict=True)]
    paths = folder / "instances.json", folder / "result.json"
    for path, content in zip(paths, (truth, found), strict=True):
        path.write_text(json.dumps(content))
    return paths


def _random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    side = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    corner = rng.random((count, 2)) * (np.array(SIDES) - side)
    return np.concatenate([corner, side], axis=1).round(2)


def measure(accumulate: Accumulate, truth: Truth, found: FoundBoxes, repeat: int) -> tuple[float, float, Arrays]:
    """Return wall and processor seconds of the fastest of `repeat` calls, and what the last one returned."""
    times = []
    for _ in range(repeat):
        wall, processor = time.perf_counter(), time.process_time()
        arrays = accumulate(truth, found, MAX_DETS)
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    return *min(times), arrays


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the times; returns 1 if the arrays differ."""
    parser = argparse.ArgumentParser(description="Time hotcoco beside pycocotools.")
    parser.add_argument("--images", type=int, default=5000, metavar="N")
    parser.add_argument("--detections", type=int, default=500_000, metavar="N")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="report the best of N runs of each")
    parsed = parser.parse_args(arguments)
    if min(parsed.images, parsed.detections, parsed.repeat) < 1:
        raise ValueError("--images, --detections and --repeat: expected 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        annotation, result = generate(Path(folder), parsed.images, parsed.detections)
        start = time.perf_counter()
        truth = read_truth(annotation)
        found = read_found(result, truth)
        reading = time.perf_counter() - start
    print(f"{parsed.images} images, {len(truth.boxes)} boxes, {len(found)} detections of {CLASSES} classes")
    print(f"reading both files   {reading:8.2f} s")
    both = []
    for name, accumulate in (("hotcoco", accumulate_hotcoco), ("pycocotools", accumulate_pycocotools)):
        wall, processor, arrays = measure(accumulate, truth, found, parsed.repeat)
        both.append(arrays)
        print(f"{name:20} {wall:8.2f} s, {processor:.2f} s of processors")
    equal = all(np.array_equal(mine, other) for mine, other in zip(*both, strict=True))
    print(f"precision and recall {'are equal to the last bit' if equal else 'DIFFER'}")
    return 0 if equal else 1


if __name__ == "__main__":
    run(main)
