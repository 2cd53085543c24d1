"""The report of a test as one HTML file that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.report.coco_files import read_found, read_truth
from core.report.detector_report import sections
from core.report.detector_report.analysis import Analysis
from core.report.detector_report.pictures import Pictures, figures
from core.report.page.html import Html, Section, document, element, join, paragraph
from core.run.atomic_file import atomic_file

NUM_PICTURE = 6  # of each kind


@dataclass(frozen=True, kw_only=True)
class ReportInput:
    """Everything that a report is made of."""

    annotation: Path
    images: Path  # folder of the images
    result: Path  # COCO's result format
    class_names: Sequence[str] = ()  # in the order of the category ids; empty: the annotations' names
    min_score: float = 0.3  # the detections that a user of the detector sees
    max_det: int = 100  # detections of a class in an image that count; see evaluation.evaluate
    log: Path | None = None  # log.jsonl of the run
    title: str = "Detector report"
    provenance: Mapping[str, str] = field(default_factory=dict)


def write_report(out: Path, report: ReportInput) -> None:
    """Write the report atomically.

    Raises:
        FileNotFoundError: a file or the folder of images is missing.
        ValueError: there are no annotations to compare with, a file is damaged, the class names are not those of the
            annotations, min_score is not between 0 and 1, or hotcoco is not installed.
    """
    if not 0 <= report.min_score <= 1:
        raise ValueError(f"min_score: expected a number from 0 to 1, got {report.min_score:g}")
    truth = read_truth(report.annotation)
    names = tuple(report.class_names) or truth.class_names
    if len(names) != len(truth.class_names):
        raise ValueError(
            f"{report.annotation} has {len(truth.class_names)} categories, but {len(names)} class names were given: "
            "give the names in the order of the category ids, or none"
        )
    analysis = Analysis(truth, read_found(report.result, truth), report.min_score, max(100, report.max_det))
    pictures = Pictures(analysis, report.images, names)
    parts = [
        sections.scores(analysis),
        sections.classes(analysis, names),
        sections.curves(analysis, names),
        sections.thresholds(analysis, names),
        sections.confusion(analysis, names),
        sections.errors(analysis),
        sections.calibration(analysis),
        sections.sizes(analysis),
        _worst_images(analysis, pictures),
        _false_positives(analysis, pictures, names),
        _misses(analysis, pictures, names),
        _label_errors(analysis, pictures, names),
        sections.training(report.log),
        sections.provenance(report.provenance),
    ]
    lead = f"AP {analysis.evaluation.AP:.3f} on {report.annotation.name}: {len(truth.images)} images"
    page = document(report.title, lead, parts)
    with atomic_file(out) as handle:
        handle.write(page.encode())


def _worst_images(analysis: Analysis, pictures: Pictures) -> Section:
    match = analysis.kept_match

    def draw(image: int) -> Html:
        counts = (match.right.get(image, 0), match.wrong.get(image, 0), match.missed.get(image, 0))
        return pictures.whole(image, "{} right, {} wrong, {} missed".format(*counts))

    lead = f"Images with the lowest F1 of the detections that score at least {analysis.min_score:g}."
    shown = figures(analysis.worst_images(NUM_PICTURE), draw, "Every box is found, and nothing else.")
    return Section("worst-images", "Worst images", join([paragraph(lead), shown]))


def _false_positives(analysis: Analysis, pictures: Pictures, names: Sequence[str]) -> Section:
    def draw(row: int) -> Html:
        found = analysis.found
        caption = f"{names[found.category[row] - 1]} {found.score[row]:.2f}: {analysis.explain(row)}"
        return pictures.around(int(found.image[row]), found.bbox[row], caption)

    lead = "Wrong detections with the highest scores."
    shown = figures(analysis.false_positives(NUM_PICTURE), draw, "No detection is wrong.")
    return Section("false-positives", "False positives", join([paragraph(lead), shown]))


def _misses(analysis: Analysis, pictures: Pictures, names: Sequence[str]) -> Section:
    lead = f"The largest boxes that no detection with a score of at least {analysis.min_score:g} finds."
    shown = figures(
        analysis.misses(NUM_PICTURE), lambda row: _box_figure(analysis, pictures, names, row), "No box is missed."
    )
    return Section("misses", "Misses", join([paragraph(lead), shown]))


def _label_errors(analysis: Analysis, pictures: Pictures, names: Sequence[str]) -> Section:
    def draw(row: int) -> Html:
        found = analysis.found
        caption = f"{names[found.category[row] - 1]} {found.score[row]:.2f}"
        return pictures.around(int(found.image[row]), found.bbox[row], caption)

    content = [
        paragraph("Places where the annotations may be wrong: look at them before the detector is blamed."),
        element("h3", "Detections where nothing is annotated"),
        figures(analysis.without_truth(NUM_PICTURE), draw, "None."),
        element("h3", "Boxes that no detection of any class and score overlaps by half"),
        figures(
            analysis.found_by_nothing(NUM_PICTURE), lambda row: _box_figure(analysis, pictures, names, row), "None."
        ),
    ]
    return Section("label-errors", "Likely label errors", join(content))


def _box_figure(analysis: Analysis, pictures: Pictures, names: Sequence[str], row: int) -> Html:
    boxes = analysis.truth.boxes
    w, h = boxes.bbox[row, 2:]
    return pictures.around(
        int(boxes.image[row]), boxes.bbox[row], f"{names[boxes.category[row] - 1]}, {w:.0f} x {h:.0f}"
    )
