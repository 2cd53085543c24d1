"""Replayed passes against eager ones, with a recorder that stands in for CUDA: what it records it does not run, a
replay reads the recorded inputs alone and overwrites the recorded outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.data.loader import make_train_loader
from core.distributed.gradient_average import GradientAverage
from core.distributed.process_group import ProcessGroup
from core.engine.cuda_graph import WARM_UP, GraphedPass, graph_obstacle
from core.engine.trainer import Trainer, build_trainer
from models.record import Batch
from tests.core.conftest import Run
from tests.two_processes import run_in_processes

CPU = torch.device("cpu")


class FakeRecorder:
    def __init__(self, module: torch.nn.Module, fails: bool = False) -> None:
        self.module = module
        self.fails = fails
        self.calls: list[str] = []

    def run_aside(self, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        self.calls.append("aside")
        return compute()

    def record(self, compute: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        self.calls.append("record")
        parameters, buffers = list(self.module.parameters()), list(self.module.buffers())
        assert all(p.grad is None for p in parameters), "the recorded pass would add to these gradients"
        before = [buffer.clone() for buffer in buffers]
        outputs = compute()
        gradients = [p.grad for p in parameters]
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        for static in [*outputs, *(g for g in gradients if g is not None)]:
            static.fill_(torch.nan)  # nothing was computed
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay() -> None:
            self.calls.append("replay")
            now = [p.grad for p in parameters]
            for parameter in parameters:
                parameter.grad = None
            for static, value in zip(outputs, compute(), strict=True):
                static.copy_(value)
            for parameter, static_gradient, grad in zip(parameters, gradients, now, strict=True):
                if static_gradient is not None:
                    assert parameter.grad is not None
                    static_gradient.copy_(parameter.grad)
                parameter.grad = grad

        return outputs, replay


def graphed(trainer: Trainer, fails: bool = False) -> tuple[Trainer, FakeRecorder]:
    recorder = FakeRecorder(trainer.module, fails)
    passes = GraphedPass(trainer.module.parameters(), trainer.config.General.batch_image, recorder)
    return replace(trainer, graphed=passes), recorder


def make(config: Any) -> tuple[Trainer, list[Batch]]:
    loader = make_train_loader(config)
    loader.end_step = 8
    return build_trainer(config, CPU, loader.iter_per_epoch, None)[0], list(loader)


def train(trainer: Trainer, batches: list[Batch]) -> dict[str, Tensor]:
    """Return the state, the numbers of the steps and the metrics after training on the batches."""
    size = trainer.config.OptimizeParam.accumulate
    steps = [[dict(b) for b in batches[i : i + size]] for i in range(0, len(batches), size)]
    values = torch.stack([trainer.step(step, number).values for number, step in enumerate(steps)])  # type: ignore[arg-type]
    scores = torch.tensor([metric.get()[1] for metric, _ in trainer.metrics])
    return {**trainer.module.state_dict(), **{f"state {n}": v for n, v in trainer.state().items()}} | {
        "values": values,
        "scores": scores,
    }


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


@pytest.mark.parametrize(
    "overrides, dtype",
    [
        ([], "float32"),
        (["General.fp16=True"], "float16"),
        (["OptimizeParam.accumulate=2"], "float32"),
        (["ModelParam.memonger=True"], "float32"),
    ],
    ids=["plain", "float16", "accumulate", "memonger"],
)
def test_replayed_steps_equal_eager_steps_bit_for_bit(
    load: Run, monkeypatch: pytest.MonkeyPatch, overrides: list[str], dtype: str
) -> None:
    monkeypatch.setattr("core.engine.trainer.precision", lambda *_: (dtype, f"computing in {dtype}"))
    config = load(*overrides)
    trainer, batches = make(config)
    expected = train(trainer, batches)
    trainer, recorder = graphed(make(config)[0])
    require_equal(train(trainer, batches), expected)
    full = sum(len(batch["files"]) == 4 for batch in batches)
    assert recorder.calls.count("aside") == WARM_UP
    assert recorder.calls.count("record") == 1
    assert recorder.calls.count("replay") == full - WARM_UP > 1
    assert full < len(batches), "no batch was eager"


def test_portrait_and_landscape_have_a_graph_each(load: Run) -> None:
    config = load("ResizeParam.long=256")
    trainer, batches = make(config)
    full = [batch for batch in batches if len(batch["files"]) == 4][:1]
    turned = dict(full[0])
    turned["image"] = full[0]["image"].transpose(1, 2).contiguous()
    turned["im_info"] = full[0]["im_info"][:, [1, 0, 2]]
    mixed: Any = [full[0], turned] * (WARM_UP + 3)
    expected = train(trainer, mixed)
    trainer, recorder = graphed(make(config)[0])
    require_equal(train(trainer, mixed), expected)
    assert recorder.calls.count("record") == 2
    assert recorder.calls.count("replay") == 6


def test_a_failed_recording_stays_eager_and_is_said_once(load: Run) -> None:
    config = load()
    trainer, batches = make(config)
    full = [batch for batch in batches if len(batch["files"]) == 4]
    expected = train(trainer, full)
    trainer, recorder = graphed(make(config)[0], fails=True)
    notes = []
    for number, batch in enumerate(full):
        notes += trainer.step([dict(batch)], number).notes  # type: ignore[list-item]
    require_equal(dict(trainer.module.state_dict()), {name: expected[name] for name in trainer.module.state_dict()})
    assert recorder.calls == ["aside"] * WARM_UP + ["record"]
    assert notes == [
        "no CUDA graph of 4 x 3 x 128 x 128, such passes stay eager: operation not permitted when stream is capturing"
    ]


def test_the_log_says_when_a_graph_is_recorded(load: Run) -> None:
    trainer, batches = make(load())
    trainer, _ = graphed(trainer)
    full = next(batch for batch in batches if len(batch["files"]) == 4)
    notes = [trainer.step([dict(full)], number).notes for number in range(WARM_UP + 2)]  # type: ignore[list-item]
    said = ["forward and backward of 4 x 3 x 128 x 128 are a CUDA graph from here on"]
    assert notes == [[]] * WARM_UP + [said, []]


def test_a_third_shape_stays_eager() -> None:
    weight = torch.ones(1, requires_grad=True)
    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(weight))
    recorder = FakeRecorder(module)
    passes = GraphedPass(module.parameters(), 2, recorder)

    def compute(inputs: Any) -> list[Tensor]:
        out = (module.weight * inputs["data"]).sum()
        out.backward()
        return [out.detach()]

    for width in (1, 2, 3):
        for _ in range(WARM_UP + 1):
            module.weight.grad = None
            (out,) = passes(compute, {"data": torch.ones(2, width)})
            assert (out.item(), module.weight.grad.tolist()) == (2 * width, [2 * width])
    assert (recorder.calls.count("record"), recorder.calls.count("replay")) == (2, 2)


def averaged(rank: int, overrides: list[str], uses_graph: bool) -> dict[str, Tensor]:
    """Return the state of one of two processes after a few steps."""
    from config.load import load_config
    from tests.small_config import DEMO

    config = load_config(str(DEMO), is_train=True, overrides=overrides)
    group = ProcessGroup(rank, 2)
    loader = make_train_loader(config, rank=rank, world_size=2)
    loader.end_step = 7
    trainer, _ = build_trainer(config, CPU, loader.iter_per_epoch, None, group)
    if uses_graph:
        trainer, _ = graphed(trainer)
        trainer = replace(trainer, average=GradientAverage(trainer.module.parameters(), group, overlaps=False))
    batches = iter(loader)
    for step in range(7):
        trainer.step([next(batches) for _ in range(loader.accumulate)], step)
    return {name: value.clone() for name, value in trainer.module.state_dict().items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_average_the_gradients_of_replays(load: Run, accumulate: int) -> None:
    from tests.small_config import SMALL_TRAINING

    data = f"DatasetParam.data_root={load().DatasetParam.data_root}"
    sizes = ["General.batch_image=1", "KvstoreParam.processes=2", f"OptimizeParam.accumulate={accumulate}"]
    sets = [*SMALL_TRAINING, data, *sizes]
    eager = run_in_processes(averaged, sets, False)
    replayed = run_in_processes(averaged, sets, True)
    for state in [*replayed, eager[1]]:
        require_equal(state, eager[0])


def test_what_keeps_a_run_from_graphs(load: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert graph_obstacle(load(), gpu) is None
    assert graph_obstacle(load(), CPU) == "there is no GPU"
    synced = load("NormalizeParam.type=syncbn", "KvstoreParam.processes=2")
    assert "communicate inside a pass" in str(graph_obstacle(synced, gpu))
    assert graph_obstacle(load("NormalizeParam.type=syncbn"), gpu) is None
    trainer, _ = make(load("General.cuda_graph=True"))
    assert trainer.graphed is None
    assert "General.cuda_graph is set: there is no GPU" in trainer.describe()
