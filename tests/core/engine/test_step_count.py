"""What a training step launches and moves, pinned, so that no change loses speed unseen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from config.load import load_config
from core.engine.step_count import PARTS, OperatorCount, StepCount, count_step
from core.engine.trainer import Trainer, build_trainer, transform_batches
from models.record import Batch
from operator_cxx import library
from symbol.torch_backend import nn as functions
from tests.small_config import DEMO, SMALL_NETWORK
from utils.benchmark_step import random_batch

CPU = torch.device("cpu")
NASFPN = "retina_r50v1b_nasfpn_640_7@256_25epoch"
FPN = "retina_r50v1b_fpn_640_1@256_25epoch"

# A step of 2 images on one device: launches, and megabytes (10^6) read and written, each in the forward pass, the
# backward pass and the update. torch 2.11 and 2.13 agree in all of them. Write smaller numbers down.
PINNED = {
    (NASFPN, "float32"): ((690, 905, 9), (8885, 13720, 1705)),
    (NASFPN, "bfloat16"): ((821, 1035, 9), (5033, 7519, 1705)),
    (FPN, "float32"): ((344, 391, 9), (6804, 10167, 1064)),
    (FPN, "bfloat16"): ((428, 474, 9), (3816, 5555, 1064)),
}


@pytest.fixture
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let this CPU compute in the type."""
    monkeypatch.setattr("core.engine.trainer.precision", lambda *_: (request.param, f"computing in {request.param}"))
    return str(request.param)


def make(path: Path | str, *overrides: str) -> tuple[Trainer, Batch]:
    """Return a trainer from scratch, and a batch with its targets."""
    sets = ["ModelParam.from_scratch=True", "KvstoreParam.gpus=()", "General.batch_image=2", "General.fp16=True"]
    config = load_config(path, is_train=True, overrides=[*sets, *overrides])
    batch = random_batch(config, CPU)
    transform_batches(config, [batch])
    return build_trainer(config, CPU, iter_per_epoch=1000, start=None)[0], batch


def count(trainer: Trainer, batch: Batch) -> StepCount:
    """Count a step with the kernels, also where they are not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "serves", lambda *_: True)
        return count_step(trainer, batch)


def changes(counted: StepCount, launches: tuple[int, ...], megabytes: tuple[int, ...]) -> list[str]:
    """Return a line for each number that is not the expected one."""
    lines = []
    for number, part in enumerate(PARTS):
        pairs = (
            ("launches", counted.launches[part], launches[number]),
            ("MB", round(counted.moved[part] / 1e6), megabytes[number]),
        )
        for unit, now, before in pairs:
            if now != before:
                remedy = "write it down in PINNED" if now < before else "find the cause"
                lines.append(f"{part}: {now} {unit}, {now - before:+d} from {before}: {remedy}")
    return lines


@pytest.mark.parametrize(("name", "dtype"), PINNED, indirect=["dtype"])
def test_a_step_launches_and_moves_no_more_than_before(name: str, dtype: str) -> None:
    trainer, batch = make(DEMO.parents[1] / "NASFPN" / f"{name}.py")
    before = {key: value.clone() for key, value in trainer.module.state_dict().items()}
    counted = count(trainer, batch)
    assert counted.not_channels_last == []
    assert changes(counted, *PINNED[name, dtype]) == []
    assert counted.launches_of.total() == counted.launches.total()
    assert counted.moved_by.total() == counted.moved.total()
    assert all(torch.equal(value, before[key]) for key, value in trainer.module.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.module.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], indirect=True)
def test_fake_tensors_launch_and_move_what_real_ones_do(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("smooth_l1", "focal_loss"):  # on a CPU these two read whether the factor is 1
        monkeypatch.setattr(f"operator_cxx.{module}.scaled", lambda grad, factor: [g * factor for g in grad])
    trainer, batch = make(DEMO, *SMALL_NETWORK)
    fake = count_step(trainer, batch)
    trainer.config.transform.batch.clear()
    trainer = replace(trainer, metrics=[])
    trainer.step([batch], 0)
    with OperatorCount() as real:
        trainer.step([batch], 1)
    assert fake.launches == real.count.launches
    assert fake.moved == real.count.moved
    assert fake.not_channels_last == real.count.not_channels_last


@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_a_lost_layout_and_a_needless_cast_show(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = count(*make(DEMO, *SMALL_NETWORK))
    assert plain.not_channels_last == []
    relu = functions._ACTIVATIONS["relu"]

    def change(function: Any) -> StepCount:
        monkeypatch.setitem(functions._ACTIVATIONS, "relu", function)  # type: ignore[arg-type]
        return count(*make(DEMO, *SMALL_NETWORK))

    def cast(data: Tensor) -> Tensor:
        return relu(data.float()).to(data.dtype)

    with_copy = change(lambda data: relu(data.contiguous()))
    assert "forward: clone.default returns (2, 8, " in with_copy.not_channels_last[0]
    assert any(line.startswith("backward: ") for line in with_copy.not_channels_last)
    with_cast = change(cast)
    assert with_cast.not_channels_last == []
    extra = with_cast.launches_of - plain.launches_of
    assert set(extra) == {"_to_copy.default"}
    assert changes(with_cast, tuple(plain.launches[part] for part in PARTS), (0, 0, 0))[0].startswith("forward: ")
