"""COCO's evaluation of detections: its twelve numbers, and AP per class, from result and annotation files.

hotcoco matches boxes and accumulates precision and recall; where it is not installed pycocotools does, whose arrays are
the same. M detections, T IoU thresholds (0.50, 0.55 ... 0.95), R recall points, K classes, A ranges of areas.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.report.coco_files import FoundBoxes, Truth, read_found, read_truth
from core.run.atomic_file import atomic_file

TABLE_WIDTH = 100


def stat_names(max_det: int = 100) -> tuple[str, ...]:
    """Return the names of COCO's twelve numbers, in its order.

    AP and the AR without a number count the best `max_det` detections of a class in an image; AR1, AR10 and
    AR<max_det> the best 1, 10 and `max_det`. s, m and l are areas up to 32^2, to 96^2 and above.
    """
    return ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", f"AR{max_det}", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class, between 0 and 1; -1 if the annotations have no box of it."""

    name: str
    AP: float
    AP50: float
    num_box: int  # annotated, without crowds
    num_image: int  # with such a box


@dataclass(frozen=True)
class Evaluation:
    """Scores between 0 and 1; -1 if the annotations have no box of that size."""

    stats: tuple[float, ...]  # in the order of stat_names(max_det)
    classes: tuple[ClassScore, ...]  # in the order of the category ids
    max_det: int  # detections of a class in an image that are counted
    num_image: int
    num_detection: int

    @property
    def AP(self) -> float:
        """COCO's primary number: the mean over classes and IoU thresholds 0.50 to 0.95."""
        return self.stats[0]

    @property
    def scores(self) -> dict[str, float]:
        """The twelve numbers by name."""
        return dict(zip(stat_names(self.max_det), self.stats, strict=True))

    @property
    def table(self) -> str:
        """The scores as text, per class and then the twelve numbers; it fits 100 columns if the class names do."""
        return "\n".join([*_class_lines(self.classes), "", *_stat_lines(self)])


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
    """Return True if hotcoco or pycocotools is installed. Training and testing import them only to compute AP."""
    return _is_installed("hotcoco") or _is_installed("pycocotools")


def evaluate(
    annotation_path: str | Path, result: str | Path | Sequence[dict[str, Any]], max_det: int = 100
) -> Evaluation:
    """Score a result file, or its entries, against annotations.

    Args:
        annotation_path: a COCO annotation file; see `read_truth`.
        max_det: detections per image that the test kept (TestParam.max_det_per_image). As many count for each class of
            an image; COCO's 100 where the test kept fewer, which changes no number.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not in COCO's format; the annotations have no
            boxes; the result is of other images.
    """
    truth = read_truth(annotation_path)
    found = read_found(result, truth)
    return score(truth, found, max(100, max_det))


def score(truth: Truth, found: FoundBoxes, max_det: int) -> Evaluation:
    """Score detections against annotations, counting the best `max_det` of each class of an image, more than 10."""
    assert max_det > 10  # AR10 is the second of three increasing numbers
    accumulate = accumulate_hotcoco if _is_installed("hotcoco") else accumulate_pycocotools
    precision, recall = accumulate(truth, found, (1, 10, max_det))  # (T, R, K, A, 3), (T, K, A, 3)
    areas = range(4)  # all, small, medium, large
    stats = [
        *(_mean(precision[t, :, :, 0, -1]) for t in (slice(None), 0, 5)),  # over IoU thresholds; at 0.50; at 0.75
        *(_mean(precision[:, :, :, area, -1]) for area in areas[1:]),
        *(_mean(recall[:, :, 0, m]) for m in range(3)),
        *(_mean(recall[:, :, area, -1]) for area in areas[1:]),
    ]
    counted = ~truth.boxes.crowd
    classes = [
        ClassScore(
            name=name,
            AP=_mean(precision[:, :, k, 0, -1]),
            AP50=_mean(precision[0, :, k, 0, -1]),
            num_box=int((mine := counted & (truth.boxes.category == k + 1)).sum()),
            num_image=len(np.unique(truth.boxes.image[mine])),
        )
        for k, name in enumerate(truth.class_names)
    ]
    return Evaluation(tuple(stats), tuple(classes), max_det, len(truth.image_ids), len(found))


def write_scores(path: str | Path, evaluation: Evaluation, image_set: str, checkpoint: str) -> None:
    """Write the scores as JSON, atomically. It has no date: the same weights and images give the same file."""
    content = {
        "image_set": image_set,
        "checkpoint": checkpoint,
        "max_det": evaluation.max_det,
        "num_image": evaluation.num_image,
        "num_detection": evaluation.num_detection,
        "stats": evaluation.scores,
        "classes": [asdict(row) for row in evaluation.classes],
    }
    with atomic_file(path) as handle:
        handle.write(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def hotcoco_datasets(truth: Truth, found: FoundBoxes) -> tuple[Any, Any]:
    """Return annotations and detections as hotcoco.COCO. Their ids are the numbers of `truth` and `found`: image and
    class 1.., annotation and detection 1.. in the order of the columns."""
    import hotcoco

    boxes = truth.boxes
    dataset = hotcoco.COCO.from_arrays(
        [{"id": i, **_size(image)} for i, image in enumerate(truth.images, start=1)],
        [{"id": k, "name": name} for k, name in enumerate(truth.class_names, start=1)],
        boxes.image,
        boxes.category,
        boxes.bbox,
        area=boxes.area,
        iscrowd=boxes.crowd.astype(np.int64),
    )
    return dataset, dataset.load_res(_rows(found))


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _size(image: dict[str, Any]) -> dict[str, int]:
    return {key: int(image[key]) for key in ("width", "height") if key in image}


def _rows(found: FoundBoxes) -> np.ndarray:
    """Return the detections as image, x, y, w, h, score, class: (D, 7)."""
    return np.column_stack([found.image, found.bbox, found.score, found.category])


def accumulate_hotcoco(
    truth: Truth, found: FoundBoxes, max_dets: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    from hotcoco import COCOeval

    evaluator = COCOeval(*hotcoco_datasets(truth, found), "bbox")
    evaluator.params.max_dets = list(max_dets)
    evaluator.evaluate()
    evaluator.accumulate()
    arrays = evaluator.eval
    assert arrays is not None  # after accumulate
    return arrays["precision"], arrays["recall"]


def accumulate_pycocotools(
    truth: Truth, found: FoundBoxes, max_dets: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    columns = (c.tolist() for c in (truth.boxes.image, truth.boxes.category, truth.boxes.bbox, truth.boxes.area))
    crowd = truth.boxes.crowd.astype(int).tolist()
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    # a match with annotation 0 counts as a false detection there: ids start at 1
    rows = zip(range(1, len(crowd) + 1), *columns, crowd, strict=True)
    with redirect_stdout(io.StringIO()):
        coco_truth, coco_found = COCO(), COCO()
        coco_truth.dataset = {
            "images": [{"id": i} for i in range(1, len(truth.image_ids) + 1)],
            "categories": [{"id": k} for k in range(1, len(truth.category_ids) + 1)],
            "annotations": [dict(zip(keys, row, strict=True)) for row in rows],
        }
        coco_truth.createIndex()
        if len(found):
            coco_found = coco_truth.loadRes(_rows(found))
        evaluator = COCOeval(coco_truth, coco_found, "bbox")
        evaluator.params.maxDets = list(max_dets)
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that are defined; -1 if none is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def _number(value: float) -> str:
    return "    -" if value < 0 else f"{value:.3f}"


def _class_lines(classes: Sequence[ClassScore]) -> list[str]:
    """Return a line per class; the columns are repeated side by side while they fit."""
    width = max(5, *(len(row.name) for row in classes))
    title = f"{'class':<{width}}    AP  AP50   boxes"
    cells = [f"{row.name:<{width}} {_number(row.AP)} {_number(row.AP50)} {row.num_box:7}" for row in classes]
    gap = "   "
    columns = max(1, min((TABLE_WIDTH + len(gap)) // (len(title) + len(gap)), math.ceil(len(cells) / 10)))
    lines = math.ceil(len(cells) / columns)
    return [gap.join([title] * columns), *(gap.join(cells[line::lines]) for line in range(lines))]


def _stat_lines(evaluation: Evaluation) -> list[str]:
    names, numbers = stat_names(evaluation.max_det), evaluation.stats
    width = max(map(len, names))
    cells = [f"{name:<{width}} {_number(number)}" for name, number in zip(names, numbers, strict=True)]
    count = f"{evaluation.num_image} images, {sum(row.num_box for row in evaluation.classes)} boxes, " + (
        f"{evaluation.num_detection} detections" if evaluation.num_detection else "nothing was detected"
    )
    return [
        "   ".join(cells[:6]),
        "   ".join(cells[6:]),
        f"{count}; at most {evaluation.max_det} of a class in an image count",
        "AP, AR: mean over IoU 0.50 to 0.95; s, m, l: area up to 32^2, up to 96^2, above",
    ]
