"""COCO's evaluation of detections: its twelve numbers and AP per class from result and annotation files.

pycocotools computes the numbers. M detections.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.run.atomic_file import atomic_file

if TYPE_CHECKING:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

STAT_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class Evaluation:
    """Scores between 0 and 1; -1 if the annotations have no box of that size."""

    stats: tuple[float, ...]  # in the order of STAT_NAMES
    class_ap: tuple[tuple[str, float], ...]  # (name, AP) in the order of the category ids; -1: no boxes
    table: str  # both as text

    @property
    def AP(self) -> float:
        """COCO's primary number: the mean over classes and IoU thresholds 0.50 to 0.95."""
        return self.stats[0]


def detections_to_coco(
    image_id: int, bbox: np.ndarray, score: np.ndarray, cls: np.ndarray, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the detections of one image as entries of a COCO result file.

    Args:
        bbox: (M, 4) xyxy with inclusive corners, in pixels of the original image; it is written as
            x, y, w = x2 - x1 + 1, h = y2 - y1 + 1.
        score: (M,).
        cls: (M,) class numbers 1..K.
        category_ids: sorted category ids; class k is category_ids[k - 1].

    Raises:
        ValueError: a box or score is not finite.
    """
    assert bbox.shape == (len(score), 4)
    assert cls.shape == score.shape
    x1, y1, x2, y2 = np.asarray(bbox, dtype=np.float64).T
    xywh = np.stack([x1, y1, x2 - x1 + 1, y2 - y1 + 1], axis=1)  # (M, 4)
    if not (np.isfinite(xywh).all() and np.isfinite(score).all()):
        raise ValueError(f"image {image_id}: detections are not finite numbers; the weights hold NaN or infinity")
    return [
        {"image_id": int(image_id), "category_id": int(category_ids[k - 1]), "bbox": box, "score": value}
        for box, value, k in zip(xywh.tolist(), score.tolist(), cls.tolist(), strict=True)
    ]


def write_result(path: str | Path, detections: Iterable[dict[str, Any]]) -> None:
    """Write a COCO result file atomically, one detection per line.

    Raises:
        OSError: the file cannot be written; an existing file of that name is unchanged.
    """
    with atomic_file(path) as handle:
        handle.write(b"[")
        for index, detection in enumerate(detections):
            handle.write(b",\n" if index else b"\n")
            handle.write(json.dumps(detection, allow_nan=False).encode())
        handle.write(b"\n]\n")


def can_evaluate() -> bool:
    """Return True if pycocotools is installed. Training and testing import it only to compute AP."""
    return importlib.util.find_spec("pycocotools") is not None


def evaluate(annotation_path: str | Path, result: str | Path | Sequence[dict[str, Any]]) -> Evaluation:
    """Score a result file, or its entries, against annotations.

    Annotations need only id, image_id, category_id and bbox: a missing area is w * h, a missing iscrowd is 0.
    Ids that are missing or 0 are replaced, because pycocotools counts a match with annotation 0 as a false detection.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not in COCO's format; the annotations have no
            boxes; the result is of other images.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = _read_truth(Path(annotation_path))
    if isinstance(result, str | Path):
        detections = _read_json(Path(result))
        if not isinstance(detections, list):
            raise ValueError(f"{result} is not a COCO result file: it must be a list of detections")
    else:
        detections = [dict(entry) for entry in result]
    _check_result(detections, truth)
    with redirect_stdout(io.StringIO()):
        coco_truth, coco_result = COCO(), COCO()
        coco_truth.dataset = truth
        coco_truth.createIndex()
        if detections:
            coco_result = coco_truth.loadRes(detections)
        evaluator = COCOeval(coco_truth, coco_result, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    with redirect_stdout(io.StringIO()) as summary:
        evaluator.summarize()
    class_ap = _class_ap(evaluator, coco_truth)
    stats = tuple(float(value) for value in evaluator.stats)
    return Evaluation(stats, class_ap, _table(summary.getvalue(), class_ap, len(detections)))


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or only a part of it ({error}): write it again") from error


def _read_truth(path: Path) -> dict[str, Any]:
    """Read the annotation file and add the fields that pycocotools needs."""
    truth = _read_json(path)
    if not isinstance(truth, dict) or not {"images", "categories"} <= truth.keys():
        raise ValueError(f"{path} is not a COCO annotation file: it needs images, annotations and categories")
    if not truth.get("annotations"):
        raise ValueError(
            f"{path} has no annotations to score against. Results on test-dev are scored by COCO's server: "
            "upload the result file there"
        )
    annotations = truth["annotations"]
    for annotation in annotations:
        if not {"image_id", "category_id", "bbox"} <= annotation.keys():
            raise ValueError(f"{path}: an annotation needs image_id, category_id and bbox, got {annotation}")
        _, _, w, h = annotation["bbox"]
        annotation.setdefault("area", w * h)
        annotation.setdefault("iscrowd", 0)
    if not all(annotation.get("id") for annotation in annotations):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    return truth


def _check_result(detections: Sequence[dict[str, Any]], truth: dict[str, Any]) -> None:
    for detection in detections:
        if not {"image_id", "category_id", "bbox", "score"} <= detection.keys():
            raise ValueError(f"a detection needs image_id, category_id, bbox and score, got {detection}")
    for key, kind in (("image_id", "images"), ("category_id", "categories")):
        unknown = {detection[key] for detection in detections} - {entry["id"] for entry in truth[kind]}
        if unknown:
            raise ValueError(
                f"the detections name {len(unknown)} {kind} that the annotations do not have, for example "
                f"{key} {sorted(unknown)[0]}: score them against the annotations of the images that were "
                "tested"
            )


def _class_ap(evaluator: COCOeval, truth: COCO) -> tuple[tuple[str, float], ...]:
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (IoU thresholds, recall points, classes)
    rows = []
    for k, category_id in enumerate(evaluator.params.catIds):
        valid = precision[:, :, k]
        valid = valid[valid > -1]
        rows.append((truth.cats[category_id]["name"], float(valid.mean()) if valid.size else -1.0))
    return tuple(rows)


def _table(summary: str, class_ap: Sequence[tuple[str, float]], num_detection: int) -> str:
    """Return AP per class in as many columns as fit a line of text, then COCO's twelve lines."""
    width = max(len(name) for name, _ in class_ap)
    cells = [f"{name:<{width}} {'    -' if ap < 0 else f'{100 * ap:5.1f}'}" for name, ap in class_ap]
    columns = max(1, 100 // (width + 9))
    rows = math.ceil(len(cells) / columns)
    lines = ["   ".join(cells[row::rows]) for row in range(rows)]
    if num_detection == 0:
        lines.insert(0, "nothing was detected")
    return "\n".join([*lines, summary.rstrip()])
