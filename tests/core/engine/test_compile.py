"""General.compile: the train graph is one graph for torch's compiler, with the eager losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from core.data.loader import make_train_loader
from core.engine.trainer import build_trainer
from tests.core.conftest import Run


@pytest.fixture
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Compile down to torch's own operators, in seconds. Returns the arguments of the calls."""
    plain, given = torch.compile, []

    def compile_quickly(function: Any, **options: Any) -> Any:
        given.append(options)
        return plain(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    torch._dynamo.reset()
    counters.clear()
    return given


def step(config: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return the numbers, the gradients and the state after one step."""
    loader = make_train_loader(config)
    loader.end_step = 1
    trainer, _ = build_trainer(config, torch.device("cpu"), loader.iter_per_epoch, None)
    values = trainer.step(list(loader), 0).values
    gradients = {name: p.grad for name, p in trainer.module.named_parameters() if p.grad is not None}
    return values, gradients, dict(trainer.module.state_dict())


def test_the_train_graph_compiles_as_one_and_computes_the_same(
    load: Run, without_code_generation: list[dict[str, Any]]
) -> None:
    values, gradients, state = step(load())
    assert without_code_generation == []
    compiled_values, compiled_gradients, compiled_state = step(load("General.compile=True"))
    assert without_code_generation == [{"fullgraph": True, "dynamic": False}]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled_values, values, rtol=1e-5, atol=0)
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(compiled_state, state, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["ModelParam.memonger=True"], "General.compile and ModelParam.memonger are both set: .* write ModelParam"),
        (
            ["NormalizeParam.type=syncbn", "KvstoreParam.processes=2"],
            "type=syncbn on several devices: .* write NormalizeParam.type=localbn, or General.compile=False",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(load: Run, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load("General.compile=True", *overrides)
    load(*overrides)
    load("General.compile=True", overrides[0] if "syncbn" in overrides[0] else "ModelParam.memonger=False")
