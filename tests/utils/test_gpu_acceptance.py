"""The GPU acceptance: run whole on the CPU in small, and its parts where a GPU would be needed to see them work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import symbol as S
from core.report.network_table import network_table
from symbol.torch_backend import nn
from symbol.torch_backend.registry import TORCH
from utils.acceptance import ap, report
from utils.acceptance.context import Context
from utils.acceptance.networks import EXPERIMENTS, NARROW, NASFPN_640, config_of, published
from utils.acceptance.parity import by_operator, steps
from utils.acceptance.stage import profile_step, speed
from utils.acceptance.stage.floor import convolutions
from utils.acceptance.stage.options import cast_behind_convolutions
from utils.acceptance.stages import BUDGET, STAGES, Stage, run_stages

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def context_in(folder: Path, seconds: float = 300.0) -> Context:
    return Context(3, CPU, folder, folder, time.monotonic() + seconds)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


def test_every_stage_runs_in_small_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "utils" / "gpu_acceptance.py"), "--out", str(out), "--device", "cpu"]
    command += ["--budget", "900"]  # enough for a busy machine
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + (out / "output.txt").read_text()[-3000:]
    first, *lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert first["environment"]["torch"] == torch.__version__
    assert {line["stage"]: line["status"] for line in lines} == dict.fromkeys(range(10), "passed")
    checks = [row for line in lines for row in line["figures"] if row["kind"] == "checks"]
    assert all(row["holds"] for row in checks)
    what = "\n".join(row["what"] for row in checks)
    for expected in ("kernels load", "float64", "channels-last", "torch.compile", "resume", "AP is within"):
        assert expected in what
    skipped = [row["what"] for line in lines for row in line["figures"] if row["kind"] == "not on this device"]
    assert "two processes" in skipped
    table = done.stdout.rpartition("\n\n")[2]
    assert [row.split()[0] for row in table.splitlines()] == [str(stage.number) for stage in STAGES]
    assert "No GPU has run it" in (out / "gpu.md").read_text()
    assert len(list(out.iterdir())) <= 8


PLANTED = {
    "planted_pass": "def run(context):\n    context.record('figures', number=1 / 3)\n",
    "planted_fail": "def run(context):\n    raise ValueError('planted')\n",
    "planted_check": "def run(context):\n    context.check('two is one', 2 == 1)\n    context.check('one', True)\n",
    "planted_skip": "def run(context):\n    context.skip('flying', 'there are no wings')\n",
    "planted_hang": (
        "import subprocess, sys, time\n"
        "def run(context):\n"
        "    context.record('figures', number=7)\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    (context.work / 'child').write_text(str(child.pid))\n"
        "    time.sleep(600)\n"
    ),
}


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in PLANTED.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["planted_fail", "planted_hang", "planted_check", "planted_skip", "planted_pass"]
    # the hanging stage has what the first one leaves over: both import torch within that
    table = [Stage(number, name, 1.0 if name == "planted_hang" else 20.0, name) for number, name in enumerate(names)]
    work = tmp_path / "work"
    work.mkdir()
    lines = run_stages(table, tmp_path / "out", work, "cpu", sum(stage.seconds for stage in table))
    assert [line["status"] for line in lines] == ["failed", "timed out", "failed", "not on this device", "passed"]
    assert "ValueError: planted" in lines[0]["error"]
    assert lines[1]["figures"] == [{"kind": "figures", "number": 7}]
    assert "1 checks do not hold: two is one" in lines[2]["error"]
    assert lines[4]["figures"] == [{"kind": "figures", "number": 0.3333}]
    stored = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in stored] == lines
    child = int((work / "child").read_text())
    assert not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes()


def test_the_stages_share_the_budget() -> None:
    assert sum(stage.seconds for stage in STAGES) == BUDGET


def test_without_time_a_stage_is_not_started(tmp_path: Path) -> None:
    lines = run_stages([Stage(0, "any", 1.0, "no_such_module")], tmp_path, tmp_path, "cpu", budget=1.0)
    assert [line["status"] for line in lines] == ["no time left"]


AHEAD = """
import time
def run(context):
    while True:
        with (context.work / 'ticks').open('a') as file:
            file.write('.')
        time.sleep(0.05)
"""
COUNT = """
import time
def run(context):
    size = lambda: (context.work / 'ticks').stat().st_size if (context.work / 'ticks').exists() else 0
    until = time.monotonic() + {wait}
    before = size()
    while time.monotonic() < until and size() == before:
        time.sleep(0.05)
    context.record('ticks', moved=size() > before)
"""


def test_what_is_started_ahead_stands_still_while_a_timed_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_ahead.py").write_text(AHEAD)
    (tmp_path / "planted_count.py").write_text(COUNT.format(wait=60))
    (tmp_path / "planted_short.py").write_text(COUNT.format(wait=1))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    table = [
        Stage(1, "first", 1, "planted_short"),
        Stage(2, "beside", 1, "planted_count"),
        Stage(4, "timed", 1, "planted_short", timed=True),
        Stage(9, "last", 1, "planted_count", ahead="planted_ahead"),
    ]
    lines = run_stages(table, tmp_path / "out", tmp_path, "cpu", 240.0)
    assert [line["figures"][-1]["moved"] for line in lines] == [False, True, False, True]
    ticks = (tmp_path / "ticks").stat().st_size
    time.sleep(0.3)
    assert (tmp_path / "ticks").stat().st_size == ticks  # it was stopped with the run


def test_the_page_of_sample_results(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    check = {"kind": "checks", "what": "a | b", "holds": False, "bound": 1e-9, "first": []}
    line = {"stage": 3, "name": "parity", "status": "failed", "seconds": 4.0, "error": "", "limit": 9}
    speed = [{"kind": "training steps", "images": 8, "images/s": 100.0}, {"kind": "training steps", "memory": "no"}]
    environment = {"device": "cuda", "card": "Card 5", "driver": "1.2"}
    content = [{"environment": environment}, {**line, "figures": []}, {**line, "figures": [check, *speed]}]
    results.write_text("".join(json.dumps(one) + "\n" for one in content) + '{"cut')
    cut_off = {"stage": 4, "kind": "rates", "GB/s": 2.5}
    (tmp_path / "figures.jsonl").write_text(json.dumps({"stage": 3, "kind": "x"}) + "\n" + json.dumps(cut_off) + "\n")
    page = report.render(results)
    for expected in (
        "## Card 5",
        "driver 1.2",
        "| 3 | parity | failed | 4 |",
        "| a \\| b | no | bound 1e-09 |",
        "| images | images/s | memory |",
        "| 8 | 100 |  |",
        "|  |  | no |",
        "| 4 | cut off | cut off | 0 |",
        "| 2.5 |",
    ):
        assert expected in page
    assert "No GPU has run it" not in page
    assert page.count("## 3: parity") == 1  # the last run of a stage counts


def test_the_page_is_what_its_results_give(tmp_path: Path) -> None:
    assert report.PAGE.read_text() == report.render(report.PAGE.with_suffix(".jsonl"))
    assert "No GPU has run it yet" in report.render(tmp_path / "results.jsonl")


def test_a_cpu_s_run_says_so(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"environment": {"device": "cpu", "processor": "some CPU"}}) + "\n")
    assert "No GPU has run it" in report.render(results)


def random_entries(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Boxes of 3 classes in 12 images, and detections: boxes jittered, some twice, some of nothing; scores tie."""
    random = np.random.default_rng(seed)
    boxes, found = [], []
    for image in range(1, 13):
        for _ in range(random.integers(0, 8)):
            box = [*random.uniform(0, 100, 2), *random.uniform(5, 60, 2)]
            entry = {"image_id": image, "category_id": int(random.integers(1, 4)), "bbox": box}
            area = box[2] * box[3]
            boxes.append({**entry, "id": len(boxes) + 1, "iscrowd": 0, "area": area})
            for _ in range(random.integers(0, 3)):
                moved = [value + random.normal(0, 3) for value in box]
                found.append({**entry, "bbox": [*moved[:2], *np.abs(moved[2:])], "score": round(random.uniform(), 1)})
        stray = {"image_id": image, "category_id": int(random.integers(1, 4)), "score": random.uniform()}
        found.append({**stray, "bbox": [*random.uniform(0, 100, 2), *random.uniform(5, 60, 2)]})
    for _ in range(120):  # more than 100 of one image and class
        found.append({**found[-1], "score": round(random.uniform(), 2)})
    return boxes, found


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_pycocotools(seed: int, tmp_path: Path) -> None:
    evaluation = pytest.importorskip("core.report.evaluation")
    pytest.importorskip("pycocotools")
    boxes, found = random_entries(seed)
    truth = {
        "images": [{"id": image, "width": 200, "height": 200} for image in range(1, 13)],
        "categories": [{"id": number, "name": f"class {number}"} for number in (1, 2, 3, 4)],
        "annotations": boxes,
    }
    annotation, result = tmp_path / "truth.json", tmp_path / "result.json"
    annotation.write_text(json.dumps(truth))
    result.write_text(json.dumps(found))
    expected = evaluation.evaluate(annotation, result).AP
    assert 0.05 < expected < 0.95
    assert ap.average_precision(annotation, result) == pytest.approx(expected, abs=1e-12)


def test_ap_refuses_crowds(tmp_path: Path) -> None:
    annotation = tmp_path / "truth.json"
    annotation.write_text(json.dumps({"images": [], "annotations": [{"iscrowd": 1}]}))
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(ValueError, match="expected none, evaluate it with pycocotools"):
        ap.average_precision(annotation, tmp_path / "result.json")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution, forward"),
        ("sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution, input gradient"),
        (
            "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_128x128>",
            "convolution, weight gradient",
        ),
        ("void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true>", "layout"),
        ("void at::native::batch_norm_transform_input_channels_last_kernel<c10::BFloat16>", "batch normalization"),
        ("void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::BFloat16>", "pooling and upsampling"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>>",
            "update and norms",
        ),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(x)>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "reductions"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix product"),
        ("void (anonymous namespace)::focal_loss_kernel<float, 1>(Level)", "Necklace's operators"),
        ("some_new_kernel", "other"),
    ],
)
def test_kernels_are_classed_by_name(name: str, expected: str) -> None:
    assert profile_step.class_of(name) == expected


def test_kernels_that_overlap_count_once() -> None:
    assert profile_step.covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 4.0


def test_figures_of_published_configs() -> None:
    found = {path.stem: published(path) for path in EXPERIMENTS.glob("retina_*.py")}
    assert [stem for stem, figures in found.items() if figures is None] == ["retina_r50v1b_tdbu_640_3@384_25epoch"]
    assert found[NASFPN_640.stem] == (8, 66.0, 7.8)


def test_speed_of_a_config_without_published_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXPERIMENTS / "retina_r50v1b_tdbu_640_3@384_25epoch.py"
    config = config_of(path, CPU, "float32", *NARROW)
    trainer = SimpleNamespace(config=config, device=CPU, compute_dtype="float32")
    monkeypatch.setattr(speed, "build", lambda *_: trainer)
    monkeypatch.setattr(speed, "_timed", lambda *_: {"images/s": 1.0})
    monkeypatch.setattr(speed, "_fits", lambda _: False)
    context = replace(context_in(tmp_path), device=torch.device("cuda"))
    speed._published_and_fastest(context, path, until=0.0)
    (row,) = rows_of(tmp_path)
    assert row["images"] == config.General.batch_image == 4
    assert not any("published" in key for key in row)


def test_the_convolutions_of_the_floor_are_all_there() -> None:
    graph = config_of(NASFPN_640, CPU, "bfloat16").ModelParam.train_symbol
    found = convolutions(graph, (640, 640))
    total = sum(count * shape.multiply_add for shape, count in found.items())
    assert total == network_table(graph, data=(1, 3, 640, 640)).multiply_add
    most = max(found, key=lambda shape: found[shape] * shape.multiply_add)
    assert str(most) == "256 to 256, 3x3 / 1, 80x80"


def test_the_predictions_cast_moves_behind_them() -> None:
    graph = config_of(NASFPN_640, CPU, "bfloat16", *NARROW).ModelParam.train_symbol
    changed = cast_behind_convolutions(graph)
    before, after = ({node.name: node for node in one.nodes()} for one in (graph, changed))
    assert before["cls_pred_s8"].inputs[0][0].op == "Cast"
    assert after["cls_pred_s8"].inputs[0][0].op == "Activation"
    assert after["cls_pred_s8_fp32"].inputs == ((after["cls_pred_s8"], 0),)
    assert changed.list_arguments() == graph.list_arguments()
    S.lower(changed)


def test_an_operator_that_computes_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(data: torch.Tensor, *, act_type: str) -> torch.Tensor:
        result = nn.activation(data, act_type=act_type)
        return result if data.dtype == torch.float64 else 1.1 * result

    monkeypatch.setitem(TORCH.lowerings, "Activation", replace(TORCH.lowerings["Activation"], function=off))
    context = context_in(tmp_path)
    by_operator.run(context)
    assert context.failures == ["operators in bfloat16 agree"]
    worst = {row["operator"]: row["outputs"] for row in rows_of(tmp_path) if row.get("precision") == "bfloat16"}
    assert worst["off"] == pytest.approx(0.1, abs=0.01)
    assert worst["convolution"] < 0.03


def test_another_layout_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(data: torch.Tensor, **attrs: Any) -> torch.Tensor:
        return nn.pooling(data, **attrs).contiguous()

    monkeypatch.setitem(TORCH.lowerings, "Pooling", replace(TORCH.lowerings["Pooling"], function=other))
    context = context_in(tmp_path)
    steps._channels_last(context, "float32")
    assert len(context.failures) == 1
    assert rows_of(tmp_path)[-1]["others"] > 0
