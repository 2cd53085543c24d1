"""NormalizeParam: its fields in the graph, and their effect on outputs and updates."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from config.load import load_config
from config.schema import ModelParam
from core.engine.optimizer import SGD, multipliers
from symbol import lower, var
from symbol.layers import normalizer_factory
from tests.small_config import SMALL_NETWORK

Build = Callable[..., ModelParam]
SMALL = [*SMALL_NETWORK, "KvstoreParam.gpus=cpu", "General.fp16=False", "BackboneParam.depth=18"]


@pytest.fixture
def build(nasfpn_640: Path, no_data: str) -> Build:
    return lambda *overrides: load_config(nasfpn_640, True, [*SMALL, no_data, *overrides]).ModelParam


def test_what_is_not_set_is_not_in_the_graph(build: Build) -> None:
    graph = build().train_symbol
    assert build("NormalizeParam.eps=1e-5", "NormalizeParam.lr_mult=1").train_symbol.tojson() == graph.tojson()
    norms = {node.attrs["eps"] for node in graph.nodes() if node.op == "BatchNorm"}
    assert norms == {1e-5}
    assert not any("__lr_mult__" in hints for hints in graph.attr_dict().values())


def test_eps_is_added_to_the_variance(build: Build) -> None:
    """Backbone, neck and head have it. In numbers: x of variance 1 and mean 0, over sqrt(1 + 3) = 2."""
    graph = build("NormalizeParam.eps=3").train_symbol
    assert {node.attrs["eps"] for node in graph.nodes() if node.op == "BatchNorm"} == {3.0}
    x = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)
    (normed,) = lower(normalizer_factory("localbn", eps=3.0)(var("x"), name="b"), x=(2, 1, 1, 1)).train()(x=x)
    assert normed.flatten().tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("lr_mult", [0.0, 0.5, 1.0])
def test_a_step_moves_gamma_and_beta_by_lr_mult(build: Build, lr_mult: float) -> None:
    graph = build(f"NormalizeParam.lr_mult={lr_mult}", "NormalizeParam.wd_mult=0").train_symbol
    features = graph.get_internals()["stage1_unit2_relu_output"]
    module = lower(features, seed=0, data=(2, 3, 32, 32)).train()
    (output,) = module(data=torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    output.square().sum().backward()
    parameters = dict(module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    sgd = SGD(parameters.items(), *multipliers(graph.attr_dict(), parameters), momentum=0.9, wd=0.0)
    sgd.step(0.01)
    assert {"bn0_gamma", "bn0_beta", "stage1_unit2_bn2_gamma"} <= parameters.keys()
    for name, parameter in parameters.items():
        factor = lr_mult if name.endswith(("_gamma", "_beta")) else 1.0
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.detach(), before[name] - 0.01 * factor * parameter.grad)
        assert torch.equal(parameter, before[name]) == (factor == 0), name
