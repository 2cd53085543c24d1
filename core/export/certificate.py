"""The certificate of an exported detector: its detections held against those of the detector that it was made from.

Both detectors are `Run`s, whatever computes them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from models.record import Batch

if TYPE_CHECKING:
    from core.inference import Detections

MIN_IOU = 0.5  # of two detections that are one: those of one detector and class overlap less, after NMS
Run = Callable[[Batch], "list[Detections]"]  # a batch as a loader yields it, images uint8, to detections per image
Score = Callable[["Sequence[Detections]"], float]  # detections of all images to AP


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest differences that a certificate accepts; None: any, and for boxes also unmatched detections."""

    box: float | None = 0.01  # pixels of the image
    score: float | None = 1e-4
    ap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Two detectors, compared on the same images: `exported` and `reference`."""

    subject: str  # the exported detector, in words
    reference: str
    images: str  # their origin
    num_image: int
    num_exported: int  # detections
    num_reference: int
    num_matched: int  # pairs, one to one
    box_difference: float  # the largest of matched pairs, pixels of the image
    score_difference: float
    ap_exported: float | None  # None: not computed
    ap_reference: float | None
    ms_exported: float  # per image, without reading it
    ms_reference: float
    tolerance: Tolerance

    @property
    def problems(self) -> list[str]:
        """Return the tolerances that are not met, in words."""
        found, allowed = [], self.tolerance
        unmatched = max(self.num_exported, self.num_reference) - self.num_matched
        if allowed.box is not None and unmatched:
            found.append(f"{unmatched} detections are not matched")
        if allowed.box is not None and self.box_difference > allowed.box:
            found.append(f"boxes differ by {self.box_difference:.2g} pixels, more than {allowed.box:g}")
        if allowed.score is not None and self.score_difference > allowed.score:
            found.append(f"scores differ by {self.score_difference:.2g}, more than {allowed.score:g}")
        if allowed.ap is not None and self.ap_exported is not None and self.ap_reference is not None:
            loss = self.ap_reference - self.ap_exported
            if loss > allowed.ap:
                found.append(f"the AP is lower by {loss:.3f}, more than {allowed.ap:g}")
        return found

    def text(self) -> str:
        """Return the certificate as lines of text."""
        ap = "not computed: the images have no annotations, or no evaluation is installed"
        if self.ap_exported is not None and self.ap_reference is not None:
            ap = f"{self.ap_exported:.4f}, reference {self.ap_reference:.4f}"
        allowed = self.tolerance
        rows = {
            "exported": self.subject,
            "reference": self.reference,
            "images": f"{self.num_image} of {self.images}, one at a time",
            "detections": f"{self.num_exported}, reference {self.num_reference}",
            "matched one to one": f"{self.num_matched} (same class, IoU {MIN_IOU:g} or more)",
            "largest difference of boxes": f"{self.box_difference:.2g} pixels{_allowed(allowed.box)}",
            "largest difference of scores": f"{self.score_difference:.2g}{_allowed(allowed.score)}",
            "AP on these images": f"{ap}{_allowed(allowed.ap)}",
            "ms per image": f"{self.ms_exported:.1f}, reference {self.ms_reference:.1f}",
            "result": "NOT MET: " + "; ".join(self.problems) if self.problems else "met",
        }
        width = max(map(len, rows))
        return "".join(f"{name:<{width}}  {value}\n" for name, value in rows.items())

    def to_json(self) -> str:
        """Return the certificate as a JSON object, for the metadata of a file."""
        return json.dumps(asdict(self) | {"problems": self.problems})


def _allowed(value: float | None) -> str:
    return "" if value is None else f" (allowed: {value:g})"


@dataclass(frozen=True)
class Found:
    """Detections of a detector on some images, and its time."""

    detector: str  # in words
    detections: list[Detections]  # per image
    ms: float  # per image


def detect_all(run: Run, batches: Sequence[Batch], detector: str) -> Found:
    """Run a detector on the batches. It is run on the first of them once more before, to be warm when it is timed."""
    found: list[Detections] = []
    seconds = 0.0
    for batch in batches:
        if not found:
            run(batch)
        start = time.perf_counter()
        detections = run(batch)
        seconds += time.perf_counter() - start
        found.extend(detections)
    return Found(detector, found, 1000 * seconds / max(1, len(found)))


def certify(
    exported: Found,
    reference: Found,
    *,
    images: str,
    score: Score | None = None,
    tolerance: Tolerance = Tolerance(),
) -> Certificate:
    """Compare what two detectors find in the same images.

    images: their origin, in words. score: returns the AP of detections of these images; None: it cannot be computed.
    Raises ValueError if there is no image.
    """
    if not reference.detections:
        raise ValueError(f"{images}: no image to compare the detectors on; name a folder of images with --images")
    matched, box, difference = 0, 0.0, 0.0
    for a, b in zip(exported.detections, reference.detections, strict=True):
        pairs = match(a, b)
        matched += len(pairs)
        rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
        box = max(box, float(np.abs(a.bbox[rows] - b.bbox[columns]).max(initial=0)))
        difference = max(difference, float(np.abs(a.score[rows] - b.score[columns]).max(initial=0)))
    return Certificate(
        subject=exported.detector,
        reference=reference.detector,
        images=images,
        num_image=len(reference.detections),
        num_exported=sum(len(one.score) for one in exported.detections),
        num_reference=sum(len(one.score) for one in reference.detections),
        num_matched=matched,
        box_difference=box,
        score_difference=difference,
        ap_exported=score(exported.detections) if score else None,
        ap_reference=score(reference.detections) if score else None,
        ms_exported=exported.ms,
        ms_reference=reference.ms,
        tolerance=tolerance,
    )


def match(a: Detections, b: Detections) -> list[tuple[int, int]]:
    """Return pairs of positions in a and b, each used once: boxes of one class with an IoU of `MIN_IOU` or more.

    Pairs are chosen by descending IoU, of equal ones those with the closest scores: the order within a and b, which
    near-equal scores can exchange, does not matter.
    """
    iou = _iou(a.bbox, b.bbox)
    row, column = np.nonzero((iou >= MIN_IOU) & (a.cls[:, None] == b.cls))
    order = np.lexsort((np.abs(a.score[row] - b.score[column]), -iou[row, column].round(4)))
    used_a, used_b, pairs = set(), set(), []
    for i, j in zip(row[order].tolist(), column[order].tolist(), strict=True):
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            pairs.append((i, j))
    return pairs


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU (A, B) of boxes (A, 4) and (B, 4) with inclusive corners."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low + 1).clip(min=0).prod(axis=2)
    area_a, area_b = ((box[:, 2:] - box[:, :2] + 1).prod(axis=1) for box in (a, b))
    return np.asarray(inter / (area_a[:, None] + area_b - inter))
