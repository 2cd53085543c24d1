"""The two scripts as a user runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.make_demo_dataset import make_demo_dataset

ROOT = Path(__file__).parents[1]
DEMO = "config/demo/retina_r18v1b_nasfpn_128_2@48_demo.py"
PUBLISHED = sorted(path.name for path in (ROOT / "config" / "NASFPN").glob("retina_*.py"))


def command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / program), *arguments]


def run(program: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NECKLACE_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(program, *arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_published_experiments_are_there() -> None:
    assert PUBLISHED == [
        "retina_r50v1b_fpn_640_1@256_25epoch.py",
        "retina_r50v1b_nasfpn_1024_7@256_25epoch.py",
        "retina_r50v1b_nasfpn_1280_7@384_25epoch.py",
        "retina_r50v1b_nasfpn_640_7@256_25epoch.py",
        "retina_r50v1b_tdbu_1280_3@384_25epoch.py",
        "retina_r50v1b_tdbu_640_3@384_25epoch.py",
    ]


def test_a_dry_run_needs_no_data(tmp_path: Path) -> None:
    path = str(ROOT / "config/NASFPN/retina_r50v1b_nasfpn_1280_7@384_25epoch.py")
    done = run("detection_train.py", "--config", path, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "98,617,140" in done.stdout
    assert "818,760,192,000" in done.stdout
    assert "an epoch: 244436 samples (each image twice, once flipped), 15278 iterations" in done.stdout
    assert "lr 0.002 to 0.02 (warm-up)" in done.stdout
    assert "NeckParam.dim_reduced = 384" in done.stdout
    assert list(tmp_path.iterdir()) == []  # nothing is written


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config", "config/none.py"], "config file config/none.py does not exist"),
        (["--config", DEMO, "--set", "NeckParam.num_stgae=3"], "num_stage"),
        (["--config", DEMO, "--set", "ResizeParam.short=100"], "a multiple of 128"),
        (["--config", DEMO, "--gpus", "x"], "--gpus: expected cpu or device numbers such as 0, got 'x'"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], expected: str) -> None:
    for program in ("detection_train.py", "detection_test.py"):
        done = run(program, *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_missing_data_is_named_with_the_remedy(tmp_path: Path) -> None:
    done = run("detection_train.py", "--config", str(ROOT / DEMO), "--data-root", "nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "nowhere/demo/annotations/instances_train.json" in done.stderr
    assert "--data-root" in done.stderr


def test_train_interrupt_resume_and_test(tmp_path: Path) -> None:
    make_demo_dataset(tmp_path / "data" / "demo", train=9, val=2, size=128, seed=0)
    small = ["General.loader_worker=1", "General.batch_image=2", "BackboneParam.num_filter=8", "TestParam.eval_epoch=0"]
    small += ["OptimizeParam.schedule.end_epoch=3", "OptimizeParam.schedule.lr_epoch=2", "General.log_frequency=1"]
    arguments = ["--config", str(ROOT / DEMO), *(word for one in small for word in ("--set", one))]
    environment = os.environ | {"NECKLACE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "experiments" / Path(DEMO).stem
    process = subprocess.Popen(
        command("detection_train.py", *arguments),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and "step 2/" not in _text(folder / "log.txt"):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "the same command with --resume continues from there" in output
    assert "Traceback" not in output
    refused = run("detection_train.py", *arguments, cwd=tmp_path)
    assert "add --resume" in refused.stderr
    resumed = run("detection_train.py", *arguments, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (folder / "checkpoint-0003.safetensors").exists()
    tested = run("detection_test.py", *arguments, "--draw", "1", cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr
    assert "AP50" in tested.stdout
    assert (folder / "demo_val_scores.json").exists()
    assert (folder / "demo_val_result.json").exists()
    assert (folder / "draw_demo_val" / "000001_1.png").exists()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
