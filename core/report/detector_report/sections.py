"""Sections of the report: each returns its part of the page from the analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from core.report.detector_report.analysis import NUM_RESAMPLE, Analysis, ScoreCurve, best_thresholds
from core.report.evaluation import stat_names
from core.report.log_curves import Record, read_log, series, smooth
from core.report.page.html import Html, Section, columns, element, folded, gallery, join, paragraph, table
from core.report.page.svg import Frame, Line, bars, chart, matrix, nice_top

MAX_SMALL = 12  # charts of classes that are shown unfolded
MAX_ROW = 15  # of a table that stands beside another or a chart
MAX_MATRIX = 20  # classes of the confusion matrix
UNIT = (0.0, 1.0)
SMALL_FRAME = Frame(UNIT, UNIT, width=220, height=170, left=34, bottom=24)

ERRORS = {  # TIDE's name: ours, and its definition
    "Cls": ("classification", "on an object of another class (IoU at least 0.5)"),
    "Loc": ("localisation", "on an object of its class, but badly (IoU 0.1 to 0.5)"),
    "Both": ("both", "on an object of another class, and badly"),
    "Dupe": ("duplicate", "on an object that a better detection has found"),
    "Bkg": ("background", "on no object (IoU below 0.1)"),
    "Miss": ("missed", "an object that no detection of another error accounts for"),
}


def scores(analysis: Analysis) -> Section:
    """Return the twelve numbers, the intervals of AP, and what is right and wrong above the report's score."""
    evaluation, names = analysis.evaluation, stat_names(analysis.max_det)
    meanings = _meanings(analysis.max_det)
    rows = []
    for name in names:
        low_high = analysis.intervals.get(name)
        interval = f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else ""
        rows.append((name, evaluation.scores[name], interval, meanings[name]))
    match = analysis.kept_match
    right, wrong, missed = (sum(counts.values()) for counts in (match.right, match.wrong, match.missed))
    num_box = sum(row.num_box for row in evaluation.classes)
    lead = (
        f"{evaluation.num_image} images with {num_box} boxes, {evaluation.num_detection} detections. "
        f"Of those that score at least {analysis.min_score:g}, {right} are right and {wrong} wrong; "
        f"{missed} boxes are missed."
    )
    note = (
        f"The intervals are percentiles of {NUM_RESAMPLE} bootstrap resamples of the images: they say how much the "
        "value depends on which images happen to be in the set."
    )
    header = ("score", "value", "95 % interval", "meaning")
    return Section("scores", "Scores", join([paragraph(lead), table(header, rows), element("p", note, class_="note")]))


def _meanings(max_det: int) -> dict[str, str]:
    ranges = ("up to 32² pixels", "32² to 96² pixels", "more than 96² pixels")
    iou = "mean over IoU 0.50 to 0.95"
    meanings = [
        f"average precision, {iou}",
        "AP at IoU 0.50",
        "AP at IoU 0.75",
        *(f"AP of objects of {text}" for text in ranges),
        f"average recall, {iou}, of the best detection of a class in an image",
        "of the best 10",
        f"of the best {max_det}",
        *(f"AR of objects of {text}" for text in ranges),
    ]
    return dict(zip(stat_names(max_det), meanings, strict=True))


def classes(analysis: Analysis, names: Sequence[str]) -> Section:
    """Return AP and counts per class."""
    detections = np.bincount(analysis.found.category[analysis.kept_rows], minlength=len(names) + 1)[1:]
    rows = [
        (name, row.AP, row.AP50, row.num_box, row.num_image, int(count))
        for name, row, count in zip(names, analysis.evaluation.classes, detections, strict=True)
    ]
    rows.sort(key=lambda row: -row[1])
    header = ("class", "AP", "AP50", "boxes", "images", f"found ≥ {analysis.min_score:g}")
    with_boxes, without = [row for row in rows if row[3]], [row for row in rows if not row[3]]
    middle = len(with_boxes) if len(with_boxes) <= MAX_ROW else (len(with_boxes) + 1) // 2
    halves = [table(header, part) for part in (with_boxes[:middle], with_boxes[middle:]) if part]
    rest = [folded(f"{len(without)} classes without boxes", table(header, without))] if without else []
    return Section("classes", "Classes", join([columns(*halves), *rest]))


def curves(analysis: Analysis, names: Sequence[str]) -> Section:
    """Return precision over recall: the mean of all classes, and every class."""
    lines = [
        Line(f"IoU {iou:.2f}", *analysis.precision_at_recall(None, iou), colour, dashed)
        for iou, colour, dashed in ((0.5, 0, False), (0.75, 1, True))
    ]
    mean = chart("Mean of all classes", lines, Frame(UNIT, UNIT), "recall", "precision")
    small = [
        chart(
            names[k],
            [
                Line("0.50", *analysis.precision_at_recall(k, 0.5), 0),
                Line("0.75", *analysis.precision_at_recall(k, 0.75), 1, dashed=True),
            ],
            SMALL_FRAME,
            small=True,
        )
        for k in _by_boxes(analysis)
    ]
    note = "Per class, recall to the right and precision upwards; solid: IoU 0.50, dashed: IoU 0.75."
    content = [gallery([mean]), element("p", note, class_="note"), _unfolded(small)]
    return Section("curves", "Precision and recall", join(content))


def thresholds(analysis: Analysis, names: Sequence[str]) -> Section:
    """Return precision, recall and F1 over the score, and each class's best score."""
    curve = analysis.score_curve(None)
    overall = _score_chart("All detections", curve, Frame(UNIT, UNIT), small=False)
    order = _by_boxes(analysis)
    small = [_score_chart(names[k], analysis.score_curve(k), SMALL_FRAME, small=True) for k in order]
    best = best_thresholds(analysis)
    rows = [(names[k], *best[k]) for k in order if k in best]
    if (i := curve.best) is not None:
        rows.insert(0, ("all", *curve.at(i)))
    header = ("class", "best score", "precision", "recall", "F1")
    first, rest = table(header, rows[:MAX_ROW]), rows[MAX_ROW:]
    more = [folded(f"{len(rest)} more classes", table(header, rest))] if rest else []
    note = "The best score of a class is the one from which on its detections have the largest F1, at IoU 0.50."
    content = [columns(overall, join([element("p", note, class_="note"), first, *more])), _unfolded(small)]
    return Section("thresholds", "Choice of a score", join(content))


def _score_chart(title: str, curve: ScoreCurve, frame: Frame, small: bool) -> Html:
    """Return precision, recall and F1 at 101 scores."""
    at = np.linspace(0, 1, 101)
    last = np.searchsorted(-curve.score, -at, side="right") - 1  # the last detection that scores at least `at`
    values = [
        np.where(last >= 0, series[np.maximum(last, 0)], np.nan) if len(series) else np.full(101, np.nan)
        for series in (curve.precision, curve.recall, curve.f1)
    ]
    lines = [Line(n, at, y, c) for n, y, c in zip(("precision", "recall", "F1"), values, (0, 1, 2), strict=True)]
    return chart(title, lines, frame, "score", small=small)


def confusion(analysis: Analysis, names: Sequence[str]) -> Section:
    """Return the confusion matrix, of the classes with most errors if there are many, and the commonest confusions."""
    counts = analysis.confusion
    num_class = len(names)
    errors = counts - np.diag(np.diag(counts))
    by_errors = np.argsort(-(errors[:num_class].sum(axis=1) + errors[:, :num_class].sum(axis=0)), kind="stable")
    shown = np.sort(by_errors[:MAX_MATRIX])
    rows = [*shown.tolist(), num_class]
    lead = (
        f"Detections that score at least {analysis.min_score:g}, matched to the boxes of any class at IoU 0.50. The "
        "last column are boxes that were missed, the last row detections on the background."
    )
    if num_class > MAX_MATRIX:
        lead += f" The {MAX_MATRIX} classes with most errors are shown."
    figure = matrix(
        "Confusion matrix", counts[np.ix_(rows, rows)], [*(names[k] for k in shown), "background"], "true", "found"
    )
    between = [(int(errors[i, j]), i, j) for i, j in np.ndindex(num_class, num_class) if errors[i, j]]
    between.sort(reverse=True)
    pairs = [(names[i], names[j], count, count / max(1, int(counts[i].sum()))) for count, i, j in between[:10]]
    table_of_pairs = (
        table(("true", "found as", "boxes", "share of the class"), pairs)
        if pairs
        else paragraph("No class is taken for another.")
    )
    return Section("confusion", "Confusion of classes", join([paragraph(lead), columns(figure, table_of_pairs)]))


def errors(analysis: Analysis) -> Section:
    """Return TIDE's errors, and the AP50 that mending each would add."""
    tide = analysis.errors
    gains = [(ERRORS[key][0], tide["delta_ap"][key], f"+{tide['delta_ap'][key]:.3f}") for key in ERRORS]
    rows = [(ERRORS[key][0], int(tide["counts"][key]), tide["delta_ap"][key], ERRORS[key][1]) for key in ERRORS]
    lead = (
        f"AP50 is {tide['ap_base']:.3f}. Every false detection, of any score, has one cause (TIDE). The gain is what "
        "mending all those of one cause, and nothing else, would add to AP50."
    )
    highest = max(gain for _, gain, _ in gains)
    header = ("error", "count", "AP50 gained", "a detection")
    figure = bars("AP50 gained by mending", gains, highest, shade=1)
    return Section("errors", "Causes of errors", join([paragraph(lead), columns(figure, table(header, rows))]))


def calibration(analysis: Analysis) -> Section:
    """Return the reliability diagram and the calibration error."""
    numbers = analysis.calibration
    bins = [b for b in numbers["bins"] if b["count"]]
    lines = [
        Line("as many right as the score says", UNIT, UNIT, 4, dashed=True),
        Line("detections", [b["avg_confidence"] for b in bins], [b["avg_accuracy"] for b in bins], 0, marked=True),
    ]
    bars_of_bins = [(b["bin_lower"], b["bin_upper"], b["avg_accuracy"]) for b in bins]
    figure = chart("Share of right detections", lines, Frame(UNIT, UNIT), "score", "right at IoU 0.50", bars_of_bins)
    rows = [
        (f"{b['bin_lower']:.1f} to {b['bin_upper']:.1f}", int(b["count"]), b["avg_confidence"], b["avg_accuracy"])
        for b in bins
    ]
    lead = (
        f"Expected calibration error {numbers['ece']:.3f}, largest error of a bin {numbers['mce']:.3f}: the difference "
        "between the mean score of detections and the share of them that are right."
    )
    header = ("score", "detections", "mean score", "share right")
    return Section("calibration", "Calibration", join([paragraph(lead), columns(figure, table(header, rows))]))


def sizes(analysis: Analysis) -> Section:
    """Return AP by the size of objects and of images."""
    objects, images = analysis.by_object_size, analysis.by_image_size
    figures = [
        bars(title, [(name, ap, f"{ap:.3f}" if ap >= 0 else "–") for name, _, ap, _ in rows], 1.0)  # noqa: RUF001
        for title, rows in (("AP by the side of objects", objects), ("AP by the longer side of images", images))
    ]
    content = [
        columns(
            join([figures[0], table(("side in pixels", "boxes", "AP", "AP50"), objects)]),
            join([figures[1], table(("longer side in pixels", "images", "AP", "AP50"), images)]),
        ),
        element("p", "The side of an object is the square root of its area.", class_="note"),
    ]
    return Section("sizes", "Sizes", join(content))


def training(log: Path | None) -> Section:
    """Return curves of the run. Raises ValueError and OSError if the log cannot be read."""
    if log is None:
        return Section("training", "Training", paragraph("The report was written without the log of the run."))
    steps, evaluations = read_log(log)
    end = max(1.0, *(float(record["step"]) for record in steps))
    panels = [
        _training_chart("Loss", steps, (("cls_loss", "classification"), ("reg_loss", "box")), end, smoothed=True),
        _training_chart("Learning rate", steps, (("lr", ""),), end),
        _training_chart("Foreground accuracy", steps, (("fg_acc", ""),), end, smoothed=True),
    ]
    if evaluations:
        panels.append(_training_chart("AP on the evaluated images", evaluations, (("AP", "AP"), ("AP50", "AP50")), end))
    return Section("training", "Training", gallery(panels))


def _training_chart(
    title: str, records: Sequence[Record], keys: Sequence[tuple[str, str]], end: float, smoothed: bool = False
) -> Html:
    lines, tops = [], []
    for index, (key, name) in enumerate(keys):
        x, y = series(records, key)
        if len(x):
            y = smooth(y) if smoothed else y
            lines.append(Line(name, x, y, index, marked=len(x) <= 40))
            finite = y[np.isfinite(y)]
            tops += [float(np.quantile(finite, 0.99) if smoothed else finite.max())] if finite.size else []
    return chart(title, lines, Frame((0.0, end), (0.0, nice_top(tops))), "step")


def provenance(entries: Mapping[str, str]) -> Section:
    """Return the table of where the result comes from."""
    return Section("provenance", "Provenance", table(("", ""), list(entries.items())))


def _by_boxes(analysis: Analysis) -> list[int]:
    """Return the classes (0..) that have boxes, most boxes first."""
    counts = [row.num_box for row in analysis.evaluation.classes]
    return sorted((k for k, count in enumerate(counts) if count), key=lambda k: -counts[k])


def _unfolded(charts: Sequence[Html]) -> Html:
    """Return small charts, beyond the first few folded away."""
    first, rest = charts[:MAX_SMALL], charts[MAX_SMALL:]
    more = [folded(f"{len(rest)} more classes", gallery(rest, small=True))] if rest else []
    return join([gallery(first, small=True), *more])
