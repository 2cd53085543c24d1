from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from core.report.train_log import TrainLog

VALUES = {
    "lr": 0.01,
    "cls_loss": 1.0,
    "reg_loss": 0.5,
    "grad_norm": 2.0,
    "fg_acc": 0.25,
    "memory_mib": 100.0,
}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_record_has_the_epoch_the_speed_and_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("core.report.train_log.time.perf_counter", lambda: now[0])
    with TrainLog(tmp_path, start_step=0, end_step=40, iter_per_epoch=20) as log:
        with log.waiting():  # the start of the workers: not counted
            now[0] = 130.0
        now[0] = 133.0
        with log.waiting():
            now[0] = 134.0
        log.steps(10, num_image=80, values=VALUES)
    (record,) = lines(tmp_path)
    assert record == VALUES | {"step": 10, "epoch": 0.5, "img_per_s": 20.0, "data_wait": 0.25, "eta_s": 12.0}
    assert "step 10/40" in (tmp_path / "log.txt").read_text()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_below_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with TrainLog(tmp_path, start_step=10, end_step=40, iter_per_epoch=20) as log:
        log.steps(40, num_image=80, values=VALUES)
    assert "25%" in terminal.getvalue()  # the step of the resume
    assert "100%" in terminal.getvalue()
    assert "step 40/40" in capsys.readouterr().out


def test_a_nan_is_null(tmp_path: Path) -> None:
    with TrainLog(tmp_path, start_step=0, end_step=40, iter_per_epoch=20) as log:
        log.steps(10, num_image=80, values=VALUES | {"fg_acc": float("nan")})  # no foreground anchor
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert lines(tmp_path)[0]["fg_acc"] is None


def test_time_outside_of_training_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("core.report.train_log.time.perf_counter", lambda: now[0])
    with TrainLog(tmp_path, start_step=0, end_step=40, iter_per_epoch=20) as log:
        now[0] = 50.0
        log.restart_clock()
        now[0] = 51.0
        log.steps(10, num_image=80, values=VALUES)
    assert lines(tmp_path)[0]["img_per_s"] == 80.0


def test_resuming_drops_records_after_the_checkpoint(tmp_path: Path) -> None:
    with TrainLog(tmp_path, start_step=0, end_step=40, iter_per_epoch=20) as log:
        for step in (10, 20, 30):
            log.steps(step, num_image=80, values=VALUES)
        log.event("eval", step=20, epoch=1, AP=0.5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 31, "lr"')  # killed while writing
    with TrainLog(tmp_path, start_step=20, end_step=40, iter_per_epoch=20) as log:
        log.steps(30, num_image=80, values=VALUES)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 20, 30]
    assert (tmp_path / "log.txt").read_text().count("step 10/40") == 1


def test_a_new_run_starts_new_files(tmp_path: Path) -> None:
    for _ in range(2):
        with TrainLog(tmp_path, start_step=0, end_step=40, iter_per_epoch=20) as log:
            log.steps(10, num_image=80, values=VALUES)
    assert len(lines(tmp_path)) == 1
    assert (tmp_path / "log.txt").read_text().count("\n") == 1


def test_resuming_with_another_global_batch_size_compares_epochs(tmp_path: Path) -> None:
    with TrainLog(tmp_path, 0, 800, 200) as log:
        for step in (200, 400, 500, 600):
            log.steps(step, 8, VALUES)
        log.event("eval", step=200, epoch=1, AP=0.5)
        log.event("tested", step=400, epoch=2)
        log.event("eval", step=600, epoch=3, AP=0.6)
    # 2.5 epochs with twice the global batch size are step 250 at 100 per epoch
    with TrainLog(tmp_path, 250, 400, 100, start_epoch=2.5) as log:
        assert log.evaluated == {1, 2}
    kept = lines(tmp_path)
    assert [record["step"] for record in kept if "event" not in record] == [200, 400, 500]
