"""Reading of the training log, and its curves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from core.report.detector_report.sections import training
from core.report.log_curves import read_log, smooth


def line(step: int, cls_loss: float = 1.0, **more: object) -> dict[str, object]:
    return {
        "step": step,
        "epoch": 0,
        "lr": 0.01,
        "cls_loss": cls_loss,
        "reg_loss": 0.5,
        "fg_acc": 0.2,
        **more,
    }


def evaluation(step: int, ap: float) -> dict[str, object]:
    return {"event": "eval", "step": step, "AP": ap}


def write(path: Path, *records: dict[str, object], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_lines_are_sorted_into_training_and_evaluation(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", {"event": "start"}, line(10), evaluation(10, 0.3), line(20), tail="\n")
    train, evaluations = read_log(log)
    assert [record["step"] for record in train] == [10, 20]
    assert evaluations == [evaluation(10, 0.3)]


def test_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    first = [line(10), evaluation(10, 0.1), line(20), line(30), evaluation(30, 0.2)]
    log = write(tmp_path / "log.jsonl", *first, line(20, 7.0), line(30, 8.0), line(40, 9.0))
    train, evaluations = read_log(log)
    assert [(record["step"], record["cls_loss"]) for record in train] == [(10, 1), (20, 7), (30, 8), (40, 9)]
    assert evaluations == [evaluation(10, 0.1)]


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    train, _ = read_log(write(tmp_path / "log.jsonl", line(10), tail='{"step": 20, "cls'))
    assert [record["step"] for record in train] == [10]


@pytest.mark.parametrize(
    "tail, message",
    [
        ("not json\n", r"log\.jsonl, line 2: Expecting value"),
        ("[1, 2]\n", r"log\.jsonl, line 2: a JSON object was expected, got \[1, 2\]"),
    ],
)
def test_other_bad_lines_are_named(tmp_path: Path, tail: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_log(write(tmp_path / "log.jsonl", line(10), tail=tail))


def test_log_without_training_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training lines"):
        read_log(write(tmp_path / "log.jsonl", {"event": "start"}))


def test_running_mean() -> None:
    few = np.array([3.0, 1.0, 2.0])
    assert smooth(few).tolist() == [3, 1, 2]  # too few to smooth
    ramp = np.arange(200.0)  # window 2 * (200 // 100) + 1 = 5
    means = smooth(ramp)
    assert means[:3] == pytest.approx([1, 1.5, 2])  # means of 0..2, 0..3, 0..4
    assert means[100] == pytest.approx(100)
    assert means[-1] == pytest.approx(198)  # mean of 197, 198, 199


@pytest.mark.parametrize(
    "records",
    [
        [line(0)],
        [line(10), line(20, float("nan")), line(30, float("inf"))],
        [{"step": 10, "cls_loss": 1.0}, evaluation(10, 0.0)],
        [line(10, fg_acc=None), line(20)],
    ],
    ids=["one line", "not finite", "few keys", "null"],
)
def test_odd_logs_have_a_section_of_the_report(tmp_path: Path, records: list[dict[str, object]]) -> None:
    section = training(write(tmp_path / "log.jsonl", *records))
    assert "Learning rate" in section.content
    assert not re.search(r"\b(nan|inf)\b", section.content)
