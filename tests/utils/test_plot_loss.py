"""The picture of a training log."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from utils import plot_loss


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


def has_colour(path: Path, colour: str) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return bool((np.abs(pixels - np.array(to_rgb(colour)) * 255).max(2) < 2).any())


def test_picture_shows_every_series(tmp_path: Path) -> None:
    records = [line(step, 1 / step) for step in range(10, 500, 10)]
    with_ap = write(tmp_path / "with.jsonl", *records, evaluation(250, 0.25), evaluation(490, 0.4))
    plot_loss.plot_loss(with_ap, tmp_path / "with.png")
    always = (plot_loss.LR_COLOUR, plot_loss.ACCURACY_COLOUR, *(colour for *_, colour in plot_loss.LOSSES))
    assert all(has_colour(tmp_path / "with.png", colour) for colour in (*always, plot_loss.AP_COLOUR))
    plot_loss.plot_loss(write(tmp_path / "no.jsonl", *records), tmp_path / "no.png")
    assert all(has_colour(tmp_path / "no.png", colour) for colour in always)
    assert not has_colour(tmp_path / "no.png", plot_loss.AP_COLOUR)


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
def test_odd_logs_are_drawn(tmp_path: Path, records: list[dict[str, object]]) -> None:
    plot_loss.plot_loss(write(tmp_path / "log.jsonl", *records), tmp_path / "loss.png")
    assert has_colour(tmp_path / "loss.png", "white")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log.jsonl", line(10), line(20))
    plot_loss.main([str(log)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "log.png")
    assert (tmp_path / "log.png").stat().st_size > 0
    with pytest.raises(SystemExit, match=r"missing\.jsonl"):
        plot_loss.main([str(tmp_path / "missing.jsonl")])
