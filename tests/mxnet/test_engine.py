"""Training and testing by MXNet, on a dozen generated images with a very small network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mxnet", reason="MXNet 1.9.1 is not in this environment: make mxnet-test runs these")

import detection_test
from config.load import format_config, load_config
from config.schema import Config
from core import detection_module, inference
from core.engine_mxnet.engine import MxnetDetector
from core.engine_mxnet.trainer import MxnetTrainer
from core.trained import find_trained
from core.weights.checkpoint import load_weights
from tests.small_config import DEMO, SMALL_TRAINING
from tests.small_run import records, stop_at
from utils.make_demo_dataset import make_demo_dataset

SMALL = [
    *SMALL_TRAINING,
    "General.log_frequency=1",
    "OptimizeParam.optimizer.lr=0.004",
    "OptimizeParam.schedule.end_epoch=2",
    "OptimizeParam.schedule.lr_epoch=1.5",
]
Load = Callable[..., Config]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_demo_dataset(root / "demo", train=9, val=4, size=128, seed=3)
    return root


@pytest.fixture
def load(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.setenv("NECKLACE_CACHE", str(tmp_path / "cache"))

    def load(name: str, *overrides: str, is_train: bool = True) -> Config:
        places = [f"General.output_root={tmp_path}", f"General.name={name}", f"DatasetParam.data_root={data_root}"]
        return load_config(str(DEMO), is_train=is_train, overrides=[*SMALL, *places, *overrides])

    return load


def test_a_run_is_that_of_torch(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Log lines are the same with nearly equal losses, and both engines read the checkpoint."""
    torch_run, mxnet_run = load("torch"), load("mxnet")
    detection_module.fit(torch_run, format_config(torch_run))
    detection_module.fit(mxnet_run, format_config(mxnet_run), engine="mxnet")
    assert "engine: MXNet 1.9.1" in (tmp_path / "mxnet" / "log.txt").read_text()
    ours, theirs = records(tmp_path / "torch"), records(tmp_path / "mxnet")
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    assert [(line["step"], line["lr"]) for line in ours] == [(line["step"], line["lr"]) for line in theirs]
    for key in ("cls_loss", "reg_loss", "grad_norm", "fg_acc"):
        assert theirs[0][key] == pytest.approx(ours[0][key], rel=1e-3), key
        assert theirs[3][key] == pytest.approx(ours[3][key], rel=0.05), key
    assert theirs[-1]["cls_loss"] < theirs[0]["cls_loss"]

    path = tmp_path / "mxnet" / "checkpoint-0002.safetensors"
    weights, progress = load_weights(path)
    assert progress.step == 10
    given, _ = load_weights(tmp_path / "torch" / "checkpoint-0002.safetensors")
    assert {name: value.shape for name, value in weights.items()} == {n: v.shape for n, v in given.items()}

    config = load("mxnet", is_train=False)
    inference.test(find_trained(path, config))
    (written,) = (tmp_path / "mxnet").glob("*result.json")
    by_torch = json.loads(written.read_text())
    called = []
    call = MxnetDetector.__call__
    monkeypatch.setattr(MxnetDetector, "__call__", lambda self, **inputs: called.append(1) or call(self, **inputs))
    inference.test(find_trained(path, config), engine="mxnet")
    assert called
    by_mxnet = json.loads(written.read_text())
    assert len(by_torch) == len(by_mxnet) > 0
    scores = [sorted(entry["score"] for entry in entries) for entries in (by_torch, by_mxnet)]
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("devices", [(), ("General.batch_image=2", "KvstoreParam.processes=2")], ids=["one", "two"])
def test_resuming_restores_the_momentum(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, devices: tuple[str, ...]
) -> None:
    whole, parts = load("whole", *devices), load("parts", *devices)
    detection_module.fit(whole, format_config(whole), engine="mxnet")
    with monkeypatch.context() as patched:
        stop_at(patched, 6, MxnetTrainer)
        detection_module.fit(parts, format_config(parts), engine="mxnet")
    assert records(tmp_path / "parts")[-1]["step"] == 7
    detection_module.fit(parts, format_config(parts), resume=True, engine="mxnet")
    ended = [load_weights(tmp_path / name / "checkpoint-0002.safetensors")[0] for name in ("whole", "parts")]
    for name, value in ended[0].items():
        torch.testing.assert_close(ended[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_the_rate_is_that_of_the_step_and_momentum_may_be_zero(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resume with another global batch size, MXNet's number of updates differs from the step."""
    common = ("OptimizeParam.optimizer.momentum=0", "OptimizeParam.schedule.lr_epoch=1")
    config = load("moved", *common, "OptimizeParam.schedule.end_epoch=2")
    plain = MxnetTrainer.step
    with monkeypatch.context() as patched:
        stop_at(patched, 4, MxnetTrainer)
        detection_module.fit(config, format_config(config), engine="mxnet")
    used = []

    def watched(self: MxnetTrainer, batches: list[Any], step: int) -> Any:
        record = plain(self, batches, step)
        used.append((record.lr, self.executors[0]._optimizer.learning_rate))
        return record

    monkeypatch.setattr(MxnetTrainer, "step", watched)
    config = load("moved", *common, "OptimizeParam.schedule.end_epoch=2", "General.batch_image=2")
    detection_module.fit(config, format_config(config), resume=True, engine="mxnet")
    assert len(used) == 9
    assert all(ours == pytest.approx(theirs) for ours, theirs in used)


def test_gpus_that_mxnet_does_not_find_are_named(load: Load) -> None:
    config = load("gpus", "KvstoreParam.gpus=0,1")
    with pytest.raises(ValueError, match="asks for the GPUs 0,1; this MXNet finds 0"):
        detection_module.fit(config, format_config(config), engine="mxnet")


def test_processes_that_do_not_fit_the_engine_are_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = load("machines", "KvstoreParam.machines=2", "KvstoreParam.kvstore=dist_sync")
    with pytest.raises(ValueError, match=r"one on each machine.*torchrun --nnodes 2 --nproc-per-node 1"):
        detection_module.fit(machines, format_config(machines), engine="mxnet")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load("several")
    with pytest.raises(ValueError, match=r"2 process.* were started.*without a launcher"):
        detection_module.fit(config, format_config(config), engine="mxnet")
    with pytest.raises(ValueError, match="tests in one process"):
        detection_test.main(["--config", str(DEMO), "--engine", "mxnet"])
