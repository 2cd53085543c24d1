"""Necklace's side of the benchmark against peers, its table, and the lines on peers that are not installed."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.small_config import DEMO, SMALL_NETWORK
from utils import benchmark_peers
from utils.benchmark_peers import Side, main, measure, necklace_side, table

CPU = torch.device("cpu")


def test_without_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torchvision", "mmcv", "mmdet", "mmengine"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    monkeypatch.setitem(benchmark_peers.CONFIGS, "fpn", str(DEMO))
    main(["--rows", "fpn", "--rounds", "2", "--batch", "3", "--precision", "float32", "--peer-half"], SMALL_NETWORK)
    lines = capsys.readouterr().out.splitlines()
    assert "3 images per step, 2 rounds" in lines[0]
    install = 'pip install -e ".[peers]"'
    missing = [line for line in lines if install in line]
    assert [line.split(" is not installed")[0] for line in missing] == ["torchvision", "MMDetection"]
    rows = [line for line in lines if line.startswith("| Necklace")]
    assert len(rows) == 2  # training and test
    for row in rows:
        name, minimum, median, ratios = (cell.strip() for cell in row.strip("|").split("|"))
        assert (name, ratios) == ("Necklace float32", "1.00, 1.00")
        assert 0 < float(minimum) <= float(median)
    assert any(line.startswith("detections:") for line in lines)


def test_necklace_side_trains_and_detects() -> None:
    side, batch = necklace_side(
        DEMO, "float32", [*SMALL_NETWORK, "General.batch_image=2", "TestParam.batch_image=2"], CPU
    )
    first, second = side.training(), side.training()
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert (first > 0).all()  # the losses
    assert not first.equal(second)  # the weights were updated
    assert side.test() > 0
    assert set(batch) == {"image", "gt_bbox", "im_info", "files"}  # as it was, for the next step and the peers
    assert [len(boxes) for boxes in benchmark_peers.boxes_of(batch)] == [8, 8]


def test_the_turns_alternate_and_the_first_is_not_timed() -> None:
    turns = []

    def side(name: str) -> Side:
        return Side(name, training=lambda: turns.append(name), test=lambda: 0)

    seconds = measure([side("a"), side("b")], "training", 2, CPU)
    assert turns == ["a", "b"] * 3
    assert {name: len(row) for name, row in seconds.items()} == {"a": 2, "b": 2}
    diverged = Side("c", training=lambda: torch.tensor([1.0, float("nan")]), test=lambda: 0)
    with pytest.raises(FloatingPointError, match="c: the losses"):
        measure([diverged], "training", 1, CPU)


def test_the_table() -> None:
    sides = [Side(name, lambda: None, lambda: 0) for name in ("Necklace float32", "Necklace bfloat16", "peer float32")]
    seconds = dict(zip((side.name for side in sides), ([2.0, 4.0, 8.0], [1.0, 1.0, 2.0], [3.0, 6.0, 6.0]), strict=True))
    assert table("training, fpn", sides, seconds, images=2) == [
        "| training, fpn | s/image, minimum | median | / Necklace float32 | / Necklace bfloat16 |",
        "|---|---|---|---|---|",
        "| Necklace float32 | 1.000 | 2.000 | 1.00, 1.00 | 2.00, 4.00 |",
        "| Necklace bfloat16 | 0.500 | 0.500 | 0.50, 0.25 | 1.00, 1.00 |",
        "| peer float32 | 1.500 | 3.000 | 1.50, 1.50 | 3.00, 6.00 |",
    ]


@pytest.mark.parametrize(
    "arguments, expected", [("--rows fpm", "--rows"), ("--batch 0", "--batch"), ("--rounds -1", "--rounds")]
)
def test_mistakes(arguments: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{expected}: expected"):
        main(arguments.split())
