"""COCO's primary number, the AP of boxes, in NumPy: for machines without pycocotools.

The mean over classes and IoU thresholds 0.50 to 0.95 of the precision at 101 points of recall, of at most 100
detections of an image, of all areas. Crowds are refused: they need rules of their own.

D detections and G boxes of one class in one image, T thresholds. Boxes are x, y, width, height.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_DET = 100

_Key = tuple[int, int]  # class and image


def average_precision(annotation: Path, result: Path) -> float:
    """The AP of a result file against an annotation file; ValueError for annotations with crowds."""
    truth, found = json.loads(annotation.read_bytes()), json.loads(result.read_bytes())
    if any(one.get("iscrowd") for one in truth["annotations"]):
        raise ValueError(f"{annotation} has crowd boxes: expected none, evaluate it with pycocotools")
    return box_ap(truth["annotations"], found, [image["id"] for image in truth["images"]])


def box_ap(
    annotations: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int]
) -> float:
    """The AP of entries of COCO's result format."""
    boxes, found = _by_key(annotations), _by_key(detections)
    means = []
    for category in sorted({category for category, _ in boxes}):
        keys = [(category, image) for image in sorted(image_ids)]
        matched, scores = [np.zeros((len(THRESHOLDS), 0), bool)], [np.zeros(0)]
        for key in keys:
            best = sorted(found.get(key, []), key=lambda one: -one["score"])[:MAX_DET]  # stable, as COCO's
            matched.append(_match([one["bbox"] for one in best], [one["bbox"] for one in boxes.get(key, [])]))
            scores.append(np.array([one["score"] for one in best]))
        order = np.argsort(-np.concatenate(scores), kind="mergesort")
        count = sum(len(boxes.get(key, [])) for key in keys)
        means.append(_precisions(np.concatenate(matched, axis=1)[:, order], count).mean())
    return float(np.mean(means))


def _by_key(entries: Sequence[Mapping[str, Any]]) -> dict[_Key, list[Mapping[str, Any]]]:
    grouped: dict[_Key, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in entries:
        grouped[entry["category_id"], entry["image_id"]].append(entry)
    return grouped


def _match(detections: Sequence[Sequence[float]], boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """(T, D) whether each detection, best first, takes a box: of those that are left the one with the largest IoU, the
    last of equals."""
    matched = np.zeros((len(THRESHOLDS), len(detections)), bool)
    if not len(detections) or not len(boxes):
        return matched
    iou = _iou(np.array(detections, np.float64), np.array(boxes, np.float64))
    for t, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(boxes), bool)
        for d, row in enumerate(iou):
            left = np.where(free, row, -1.0)
            g = len(left) - 1 - int(np.argmax(left[::-1]))
            if left[g] >= min(threshold, 1 - 1e-10):
                matched[t, d], free[g] = True, False
    return matched


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(D, G) of (D, 4) and (G, 4)."""
    a, b = first[:, None], second[None]
    sides = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(min=0).prod(axis=2)
    return common / (a[..., 2:].prod(axis=2) + b[..., 2:].prod(axis=2) - common)


def _precisions(matched: np.ndarray, count: int) -> np.ndarray:
    """(T, 101) precision at each recall, from (T, D) of all images in the order of the scores."""
    out = np.zeros((len(THRESHOLDS), len(RECALLS)))
    for t, hits in enumerate(matched):
        right = np.cumsum(hits)
        precision = right / np.arange(1, len(hits) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(right / count, RECALLS, side="left")
        reached = at < len(envelope)
        out[t, reached] = envelope[at[reached]]
    return out
