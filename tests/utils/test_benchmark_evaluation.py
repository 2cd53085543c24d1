"""The benchmark of evaluation compares equal arrays, and says so if they differ."""

from __future__ import annotations

import numpy as np
import pytest

from utils import benchmark_evaluation

SMALL = ("--images", "20", "--detections", "300")


def test_it_prints_both_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_evaluation.main(SMALL) == 0
    printed = capsys.readouterr().out
    assert "20 images, 140 boxes, 300 detections of 80 classes" in printed
    assert "\nhotcoco " in printed
    assert "\npycocotools " in printed
    assert "equal to the last bit" in printed


def test_a_difference_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = benchmark_evaluation.accumulate_hotcoco

    def changed(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        precision, recall = original(*arguments)
        return precision, recall * (1 - 2**-52)

    monkeypatch.setattr(benchmark_evaluation, "accumulate_hotcoco", changed)
    assert benchmark_evaluation.main(SMALL) == 1
    assert "recall DIFFER" in capsys.readouterr().out


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        benchmark_evaluation.main(("--images", "0"))
