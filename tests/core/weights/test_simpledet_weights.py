"""SimpleDet's checkpoints, whose BatchNorms are merged or have other names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import symbol as S
from config.load import load_config
from config.schema import Config, NormalizeParam
from core.weights.first_weights import load_given_weights, shapes_of
from core.weights.fit import require_fit
from core.weights.params_file import write_params
from core.weights.simpledet_weights import from_simpledet, neck_norm_name
from symbol.layers import normalizer_factory
from tests.core.weights.test_first_weights import load as load_first
from tests.small_config import DEMO, SMALL_NETWORK
from utils.convert_checkpoint import convert

DATA = (2, 3, 6, 6)


def network(eps: float, seed: int) -> nn.Module:
    """Return two convolutions with fixed BatchNorms of random statistics."""
    norm = normalizer_factory(type="fixbn", eps=eps)
    x = S.Convolution(S.var("data"), name="conv0", num_filter=4, kernel=(3, 3), no_bias=True)
    x = S.Activation(norm(x, name="bn0"), act_type="relu")
    x = norm(S.Convolution(x, name="conv1", num_filter=2, kernel=(1, 1)), name="bn1")
    module = S.lower(x, seed=seed, data=DATA)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if "bn" in name:
            tensor.uniform_(0.5, 2.0, generator=generator)
    return module


def merged(tensors: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
    """Return the tensors that SimpleDet saves for fixed BatchNorms: y = gamma x + beta, without statistics."""
    saved = dict(tensors)
    for name in [name.removesuffix("_gamma") for name in tensors if name.endswith("_gamma")]:
        mean, var = saved.pop(f"{name}_moving_mean"), saved.pop(f"{name}_moving_var")
        gamma = tensors[f"{name}_gamma"] / (var + eps).sqrt()
        beta = tensors[f"{name}_beta"] - gamma * mean
        saved[f"{name}_gamma"], saved[f"{name}_beta"] = gamma.reshape(1, -1, 1, 1), beta.reshape(1, -1, 1, 1)
    return saved


def write_merged(path: Path, module: nn.Module, eps: float) -> Path:
    write_params(path, merged(module.state_dict(), eps))
    return path


def config_from(path: Path, kind: str, eps: float = 1e-5) -> Config:
    config = Config()
    config.ModelParam.init_from = str(path)
    config.NormalizeParam.type, config.NormalizeParam.eps = kind, eps  # type: ignore[assignment]
    return config


@pytest.mark.parametrize("suffix", [".params", ".safetensors"])
@pytest.mark.parametrize("eps, own_eps", [(1e-5, 1e-5), (2e-5, 1e-3)])
def test_a_merged_network_computes_the_same(tmp_path: Path, suffix: str, eps: float, own_eps: float) -> None:
    """The eps of merging is contained in gamma and beta; ours is that of the config."""
    trained, module = network(eps, seed=1), network(own_eps, seed=2)
    path = write_merged(tmp_path / "checkpoint-0006.params", trained, eps)
    if suffix == ".safetensors":
        convert(path, path := path.with_suffix(suffix))
    lines = load_first(module, config_from(path, "fixbn", own_eps))
    assert lines == [
        f"{path}: SimpleDet merged 2 fixed BatchNorms; they get the mean 0 and the variance 1 - eps",
        f"fine-tuning {path}: 11 of 11 tensors loaded, the others are random",
    ]
    data = torch.rand(DATA, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        torch.testing.assert_close(module.train(mode)(data=data)[0], trained(data=data)[0], rtol=1e-5, atol=1e-5)
    scale = 1 / (module.state_dict()["bn0_moving_var"] + own_eps).sqrt()
    assert torch.equal(scale, torch.ones(4))


@pytest.mark.parametrize("kind", ["localbn", "syncbn"])
def test_merged_norms_require_fixed_statistics(tmp_path: Path, kind: str) -> None:
    path = write_merged(tmp_path / "checkpoint-0006.params", network(1e-5, seed=1), 1e-5)
    module = network(1e-5, seed=2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"{path} was trained by SimpleDet .* such as bn0\..*set NormalizeParam\.type"
    ):
        load_first(module, config_from(path, kind))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_norms_that_were_not_merged_keep_their_statistics() -> None:
    """SimpleDet does not merge a BatchNorm that follows no convolution."""
    module = network(1e-5, seed=1)
    saved = merged(module.state_dict(), 1e-5) | {n: t for n, t in module.state_dict().items() if n.startswith("bn1")}
    found, (line,) = from_simpledet(saved, shapes_of(module), NormalizeParam(type="fixbn"), "a.params")
    assert "merged 1 fixed" in line
    assert all(found[name] is tensor for name, tensor in saved.items() if name.startswith("bn1"))
    assert saved["bn0_gamma"].shape == (1, 4, 1, 1)  # the caller's tensors are unchanged


@pytest.mark.parametrize(
    "saved, expected",
    [
        ({"scale_gamma": torch.ones(1, 3, 1, 1)}, {"scale_gamma"}),  # no BatchNorm
        ({"bn0_gamma": torch.ones(2, 3, 1, 1)}, {"bn0_gamma", "bn0_moving_mean"}),
        ({"bn0_gamma": torch.ones(3)}, {"bn0_gamma", "bn0_moving_mean"}),  # statistics are missing without merging
        ({"bn0_gamma": torch.ones(1, 3, 1, 1), "bn0_moving_mean": torch.ones(3)}, {"bn0_gamma", "bn0_moving_mean"}),
        ({"S1_P4_1_bn_gamma": torch.ones(3)}, {"S1_P4_1_bn_gamma"}),
        ({"S1_P4_1_bn_gamma": torch.ones(3)}, {"other"}),
        ({"S1_P4_1_bn_gamma": torch.ones(3), "S1_P4_1_bn_neck_gamma": torch.ones(3)}, {"S1_P4_1_bn_neck_gamma"}),
    ],
)
def test_other_tensors_are_unchanged(saved: dict[str, Tensor], expected: set[str]) -> None:
    assert from_simpledet(saved, expected, NormalizeParam(), "a.params") == (saved, [])


@pytest.mark.parametrize(
    "name, ours",
    [
        ("S7_P6_7_bn", "S7_P6_7_bn_neck"),
        ("S12_P4_1_bn_moving_var", "S12_P4_1_bn_neck_moving_var"),
        ("S1_P4_1_bn_neck", "S1_P4_1_bn_neck"),
        ("S1_P4_1_bn_neck_gamma", "S1_P4_1_bn_neck_gamma"),
        ("S1_P4_1_weight", "S1_P4_1_weight"),
        ("P3_conv_bn_gamma", "P3_conv_bn_gamma"),
        ("stage4_unit3_bn3", "stage4_unit3_bn3"),
    ],
)
def test_names_of_the_necks_norms(name: str, ours: str) -> None:
    assert neck_norm_name(name) == ours


@pytest.mark.parametrize("kind", ["localbn", "fixbn"])
def test_a_nas_fpn_of_simpledet_fits(tmp_path: Path, kind: str) -> None:
    """All tensors fit, with SimpleDet's names in the neck and its shapes of fixed BatchNorms."""
    given = ["RpnParam.num_class=4", "ModelParam.from_scratch=False", f"NormalizeParam.type={kind}"]
    config = load_config(str(DEMO), False, [*SMALL_NETWORK, f"DatasetParam.data_root={tmp_path}", *given])
    graph = config.ModelParam.test_symbol
    module = S.lower(graph)
    saved = module.state_dict() if kind == "localbn" else merged(module.state_dict(), 1e-5)
    write_params(tmp_path / "net-0025.params", {name.replace("_bn_neck_", "_bn_"): t for name, t in saved.items()})
    tensors, progress = load_given_weights(tmp_path / "net-0025.params")
    assert "S1_P6_7_bn_gamma" in tensors
    names = [*graph.list_arguments(), *graph.list_auxiliary_states()]
    found, lines = from_simpledet(tensors, names, config.NormalizeParam, "net-0025.params")
    require_fit(shapes_of(module), found, "net-0025.params")
    num_stat = 4 if kind == "localbn" else 2
    assert lines[0] == (
        f"net-0025.params: {7 * num_stat} tensors of the neck's BatchNorms have SimpleDet's names: "
        "S1_P4_1_bn_gamma is S1_P4_1_bn_neck_gamma here"
    )
    assert len(lines) == (1 if kind == "localbn" else 2)
    assert torch.equal(found["S1_P6_7_bn_neck_beta"], saved["S1_P6_7_bn_neck_beta"].flatten())
    assert progress.epoch == 25
