"""The report: its numbers computed by hand on four images, and its page read by a parser and by a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.report.coco_files import read_found, read_truth
from core.report.detector_report.analysis import Analysis, best_thresholds
from core.report.detector_report.pictures import MIN_REGION, surroundings
from core.report.detector_report.report import ReportInput, write_report

SECTIONS = (
    *("scores", "classes", "curves", "thresholds", "confusion", "errors", "calibration", "sizes", "worst-images"),
    *("false-positives", "misses", "label-errors", "training", "provenance"),
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CAT, DOG = 5, 9
A, B, C, D = [20, 20, 40, 40], [100, 60, 50, 50], [10, 10, 30, 60], [60, 60, 60, 60]
CROWD = [0, 0, 200, 160]


def truth() -> dict[str, Any]:
    """Two cats, two dogs and a crowd of dogs in four images."""
    boxes = [(1, CAT, A, 0), (1, DOG, B, 0), (2, CAT, C, 0), (3, DOG, D, 0), (4, DOG, CROWD, 1)]
    return {
        "images": [{"id": i, "file_name": f"<{i}> & co.png", "width": 200, "height": 160} for i in (1, 2, 3, 4)],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "<dog>"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for n, (i, k, box, crowd) in enumerate(boxes, start=1)
        ],
    }


def found() -> list[dict[str, Any]]:
    """Right: A, C, and B with a low score. Wrong: a cat on dog B, C a second time, nothing. Ignored: in the crowd."""
    boxes = [
        (1, CAT, A, 0.9),
        (1, CAT, B, 0.8),
        (1, DOG, B, 0.2),
        (2, CAT, C, 0.7),
        (2, CAT, [11, 10, 30, 60], 0.6),
        (3, CAT, [5, 5, 20, 20], 0.5),
        (4, DOG, [50, 50, 40, 40], 0.95),
    ]
    return [{"image_id": i, "category_id": k, "bbox": box, "score": s} for i, k, box, s in boxes]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    folder = tmp_path_factory.mktemp("report")
    (folder / "images").mkdir()
    for image in truth()["images"]:
        pixels = np.random.default_rng(image["id"]).integers(0, 256, (160, 200, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])
    (folder / "truth.json").write_text(json.dumps(truth()))
    (folder / "result.json").write_text(json.dumps(found()))
    steps = [{"step": s, "lr": 0.01, "cls_loss": 1 / s, "reg_loss": 0.5, "fg_acc": 0.9} for s in (10, 20, 30)]
    records = [*steps, {"event": "eval", "step": 30, "AP": 0.25, "AP50": 0.5}]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ReportInput(
        annotation=folder / "truth.json",
        images=folder / "images",
        result=folder / "result.json",
        log=folder / "log.jsonl",
        title="Cats <and> dogs",
        provenance={"checkpoint": "checkpoint-0003.safetensors"},
    )


@pytest.fixture(scope="module")
def analysis(report: ReportInput) -> Analysis:
    annotated = read_truth(report.annotation)
    return Analysis(annotated, read_found(report.result, annotated), min_score=0.3)


@pytest.fixture(scope="module")
def page(report: ReportInput) -> Path:
    path = report.annotation.with_name("report.html")
    write_report(path, report)
    return path


def test_matches(analysis: Analysis) -> None:
    assert analysis.match.status.tolist() == [1, 0, 1, 1, 0, 0, -1]
    assert analysis.match.is_missed.tolist() == [False, False, False, True, False]
    match = analysis.kept_match  # without the dog of score 0.2
    assert match.status.tolist() == [1, 0, -1, 1, 0, 0, -1]
    assert match.is_found.tolist() == [True, False, True, False, False]
    assert match.is_missed.tolist() == [False, True, False, True, False]
    assert (match.right, match.wrong, match.missed) == ({1: 1, 2: 1}, {1: 1, 2: 1, 3: 1}, {1: 1, 3: 1})


def test_curves_and_best_scores(analysis: Analysis) -> None:
    """Cats: right, wrong, right, wrong, wrong. Precision at a recall is the highest at that recall or a larger one."""
    recall, precision = analysis.precision_at_recall(0, 0.5)
    np.testing.assert_allclose(precision, np.where(recall <= 0.5, 1, 2 / 3))
    np.testing.assert_allclose(analysis.precision_at_recall(1, 0.75)[1], np.where(recall <= 0.5, 1, 0))
    np.testing.assert_allclose(analysis.precision_at_recall(None, 0.5)[1], np.where(recall <= 0.5, 1, 1 / 3))
    curve = analysis.score_curve(0)
    np.testing.assert_allclose(curve.score, [0.9, 0.8, 0.7, 0.6, 0.5])
    np.testing.assert_allclose(curve.precision, [1, 1 / 2, 2 / 3, 2 / 4, 2 / 5])
    np.testing.assert_allclose(curve.recall, [0.5, 0.5, 1, 1, 1])
    best = best_thresholds(analysis)
    assert best == {0: pytest.approx((0.7, 2 / 3, 1, 0.8)), 1: pytest.approx((0.2, 1, 0.5, 2 / 3))}


def test_detections_of_equal_score_are_one_point_of_the_curve(report: ReportInput) -> None:
    annotated = read_truth(report.annotation)
    equal = [entry | {"score": 0.5} for entry in found()]
    curve = Analysis(annotated, read_found(equal, annotated), 0.3).score_curve(0)
    assert (curve.score.tolist(), curve.precision.tolist(), curve.recall.tolist()) == ([0.5], [2 / 5], [1.0])


def test_errors(analysis: Analysis) -> None:
    """The crowd's detection is no error in any of them."""
    assert analysis.confusion.tolist() == [[2, 0, 0], [1, 0, 1], [2, 0, 0]]
    assert analysis.errors["counts"] == {"Cls": 1, "Loc": 0, "Both": 0, "Dupe": 1, "Bkg": 1, "Miss": 1}
    differences = [1 - 0.9, 0.8, 1 - 0.2, 1 - 0.7, 0.6, 0.5]  # one detection in each bin
    assert analysis.calibration["ece"] == pytest.approx(sum(differences) / 6)
    assert analysis.calibration["num_detections"] == 6
    assert [analysis.explain(row) for row in (1, 4, 5)] == [
        "on a <dog> (IoU 1.00)",
        "second detection of a cat",
        "nothing is there",
    ]


def test_rankings(analysis: Analysis) -> None:
    assert analysis.worst_images(9) == [3, 1, 2]
    assert analysis.false_positives(9) == [1, 4, 5]
    assert analysis.false_positives(2) == [1, 4]
    assert analysis.misses(9) == [3, 1]
    assert analysis.without_truth(9) == [5]
    assert analysis.found_by_nothing(9) == [3]


def test_sizes_and_intervals(analysis: Analysis) -> None:
    """All sides lie between 40 and 60 pixels, and all images have one size."""
    AP, AP50 = analysis.evaluation.stats[:2]
    (objects,) = analysis.by_object_size
    assert objects == ("32 to 64", 4, pytest.approx(AP), pytest.approx(AP50))
    assert analysis.by_image_size == [("200", 4, pytest.approx(AP), pytest.approx(AP50))]
    assert analysis.intervals.keys() == {"AP", "AP50", "AP75"}
    low, high = analysis.intervals["AP"]
    assert 0 <= low < AP < high <= 1


def test_image_sizes_are_grouped(report: ReportInput) -> None:
    content = truth()
    content["images"] = [{"id": i, "file_name": "x.png", "width": 100 + 10 * i, "height": 50} for i in range(1, 21)]
    path = report.annotation.with_name("sizes.json")
    path.write_text(json.dumps(content))
    annotated = read_truth(path)
    groups = Analysis(annotated, read_found(found(), annotated), 0.3).by_image_size
    assert sum(count for _, count, _, _ in groups) == 20
    assert [name for name, *_ in groups] == ["110 to 150", "160 to 200", "210 to 240", "250 to 300"]
    assert groups[1][2] == -1.0  # no boxes there


def test_a_region_lies_around_its_box_and_in_the_image() -> None:
    assert surroundings(np.array([300, 200, 100, 100]), 1000, 800) == (200, 100, 500, 400)
    assert surroundings(np.array([0, 0, 10, 10]), 1000, 800) == (0, 0, MIN_REGION, MIN_REGION)
    assert surroundings(np.array([90, 40, 10, 10]), 100, 50) == (0, 0, 100, 50)


class Reader(HTMLParser):
    """Collects the texts of sections, and checks that every element is closed in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sections: dict[str, str] = {}
        self.images: dict[str, int] = {}
        self.section = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attributes}
        self.links += [value for key, value in values.items() if key in ("src", "href", "srcset", "data", "action")]
        assert tag != "script"
        assert not any(key.startswith("on") for key in values)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "section":
            self.section = values["id"]
            self.sections[self.section] = ""
            self.images[self.section] = 0
        if tag == "img":
            self.images[self.section] += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, text: str) -> None:
        if self.section:
            self.sections[self.section] += text + " "


@pytest.fixture(scope="module")
def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_loads_nothing(page: Path, read: Reader) -> None:
    assert tuple(read.sections) == SECTIONS
    assert len(read.ids) == len(set(read.ids))
    inner = [link[1:] for link in read.links if link.startswith("#")]
    assert inner == list(SECTIONS)
    assert all(link.startswith(("#", "data:")) for link in read.links)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?:", text)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*", "", text))
    assert "<title>Cats &lt;and&gt; dogs</title>" in text


def test_the_page_shows_the_numbers(read: Reader, analysis: Analysis) -> None:
    sections = {name: " ".join(text.split()) for name, text in read.sections.items()}
    assert "2 are right and 3 wrong; 2 boxes are missed" in sections["scores"]
    assert f"AP {analysis.evaluation.AP:.3f}" in sections["scores"]
    low, high = analysis.intervals["AP"]
    assert f"{low:.3f} to {high:.3f}" in sections["scores"]
    cat = analysis.evaluation.classes[0]
    assert f"cat {cat.AP:.3f} {cat.AP50:.3f} 2 2 5" in sections["classes"]
    assert "cat 0.700 0.667 1.000 0.800" in sections["thresholds"]
    assert "<dog> cat 1 0.500" in sections["confusion"]
    assert f"classification 1 {analysis.errors['delta_ap']['Cls']:.3f}" in sections["errors"]
    assert f"calibration error {analysis.calibration['ece']:.3f}" in sections["calibration"]
    assert "32 to 64 4" in sections["sizes"]
    assert "<3> & co.png: 0 right, 1 wrong, 1 missed" in sections["worst-images"]
    assert "cat 0.80: on a <dog> (IoU 1.00)" in sections["false-positives"]
    assert "<dog>, 60 x 60" in sections["misses"]
    assert "cat 0.50" in sections["label-errors"]
    assert "Learning rate" in sections["training"]
    assert "checkpoint checkpoint-0003.safetensors" in sections["provenance"]
    shown = {name: count for name, count in read.images.items() if count}
    assert shown == {"worst-images": 3, "false-positives": 3, "misses": 2, "label-errors": 2}


def test_a_perfect_result_an_empty_one_and_one_without_a_log(report: ReportInput, tmp_path: Path) -> None:
    """Every section says so where it has nothing to show."""
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in truth()["annotations"]
        if not a["iscrowd"]
    ]
    for name, entries, expected in (
        ("perfect", perfect, ("No box is missed.", "No detection is wrong.", "No class is taken for another.")),
        ("empty", [], ("0 detections", "No detection is wrong.")),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
        given = ReportInput(annotation=report.annotation, images=report.images, result=tmp_path / f"{name}.json")
        write_report(tmp_path / f"{name}.html", given)
        text = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        assert all(sentence in text for sentence in (*expected, "without the log of the run"))


def test_a_picture_that_cannot_be_read_is_named(report: ReportInput, tmp_path: Path) -> None:
    shutil.copytree(report.images, tmp_path / "images")
    (tmp_path / "images" / "<3> & co.png").write_bytes(b"no picture")
    given = ReportInput(annotation=report.annotation, images=tmp_path / "images", result=report.result)
    write_report(tmp_path / "report.html", given)
    assert "not drawn: cannot read image" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"annotation": "empty.json"}, ValueError, "has no annotations to score against"),
        ({"annotation": "none.json"}, FileNotFoundError, r"no file .*none\.json"),
        ({"annotation": "unnamed.json"}, ValueError, "needs file_name, width and height of an image"),
        ({"images": "nowhere"}, FileNotFoundError, r"no folder .*nowhere"),
        ({"class_names": ("cat",)}, ValueError, "2 categories, but 1 class names"),
        ({"min_score": 1.5}, ValueError, "min_score: expected a number from 0 to 1, got 1.5"),
    ],
)
def test_refusals_leave_no_file(
    report: ReportInput, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    (tmp_path / "empty.json").write_text(json.dumps(truth() | {"annotations": []}))
    (tmp_path / "unnamed.json").write_text(json.dumps(truth() | {"images": [{"id": i} for i in (1, 2, 3, 4)]}))
    change = {key: tmp_path / value if key in ("annotation", "images") else value for key, value in change.items()}
    given = {"annotation": report.annotation, "images": report.images, "result": report.result} | change
    with pytest.raises(error, match=message):
        write_report(tmp_path / "report.html", ReportInput(**given))
    assert not (tmp_path / "report.html").exists()


def test_without_hotcoco_the_remedy_is_named(
    report: ReportInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ValueError, match="pip install hotcoco"):
        write_report(tmp_path / "report.html", report)


def browse(page: Path) -> tuple[str, str]:
    """Open a page; returns its document afterwards, and the messages of the console."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"),
        *("--virtual-time-budget=10000", f"--user-data-dir={page.parent / 'browser'}", page.as_uri()),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout, "\n".join(line for line in ended.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="no chromium and no google-chrome is installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_opens_it_without_an_error(page: Path, tmp_path: Path, width: int) -> None:
    """A script that is added to a copy measures it, in a frame: windows are not narrower than 500 pixels."""
    script = (
        "<script>addEventListener('load', () => {"
        "const broken = [...document.images].filter(i => i.complete && !i.naturalWidth).length;"
        "parent.postMessage([innerWidth, document.documentElement.scrollWidth, broken, "
        "[...document.querySelectorAll('section')].filter(s => s.offsetHeight > 60).map(s => s.id)].join(' '), '*');"
        "})</script>"
    )
    copy, frame = tmp_path / "copy.html", tmp_path / "frame.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    frame.write_text(
        "<title></title><script>addEventListener('message', m => { document.title = m.data; })</script>"
        f"<iframe src='copy.html' style='width: {width}px; height: 800px; border: 0'></iframe>"
    )
    dom, console = browse(frame)
    assert console == ""
    found_title = re.search(r"<title>(.*?)</title>", dom)
    assert found_title is not None
    inner, content, broken, shown = found_title[1].split(" ")
    assert int(inner) == width
    assert int(content) <= width  # nothing makes the page scroll sideways
    assert broken == "0"
    assert tuple(shown.split(",")) == SECTIONS
    copy.write_text("<script>missing()</script>")  # an error would be seen
    assert "missing is not defined" in browse(frame)[1]
