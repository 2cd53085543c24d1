"""The benchmark of detection in one image, on the demo's network."""

from __future__ import annotations

import sys

import pytest

from tests.small_config import DEMO
from utils import benchmark_detector


def test_every_side_detects(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(benchmark_detector, "CONFIG", DEMO)
    monkeypatch.setattr(benchmark_detector, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark_detector.py", "--side", "128", "--rounds", "2"])
    assert benchmark_detector.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'torchvision is not installed: pip install -e ".[peers]"'
    rows = {cells[1].strip(): cells for line in lines if len(cells := line.split("|")) == 7}
    ours, exported = rows["Detector, float32"], rows["ONNX in onnxruntime, float32"]
    assert ours[4].strip() == "1.00"
    assert float(exported[4]) > 0
    assert ours[5].strip() == exported[5].strip() == "100"  # max_det_per_image


def test_the_sides_take_turns() -> None:
    turns: list[str] = []
    sides = {name: lambda name=name: turns.append(name) or 0 for name in ("a", "b")}
    seconds = benchmark_detector.measure(sides, rounds=2)
    assert turns == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
