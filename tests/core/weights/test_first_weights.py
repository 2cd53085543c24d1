"""Initial weights from MXNet's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import symbol as S
from config.schema import Config
from core.weights.first_weights import first_weights, load_given_weights, shapes_of
from core.weights.params_file import write_params
from models.retinanet.builder import MSRAResNetV1bFPN, MSRAResNetV1FPN
from utils.convert_checkpoint import convert


def small_module(num_filter: int = 2, seed: int = 0) -> nn.Module:
    x = S.Convolution(S.var("data"), name="conv0", num_filter=3, kernel=(3, 3), no_bias=True)
    x = S.BatchNorm(x, name="bn0", fix_gamma=False)
    x = S.Convolution(x, name="cls_pred", num_filter=num_filter, kernel=(1, 1))
    return S.lower(x, seed=seed, data=(1, 3, 8, 8))


def load(module: nn.Module, config: Config) -> list[str]:
    """Load the first weights as a trainer does. Returns the lines for the log."""
    tensors, lines = first_weights(shapes_of(module), config, None)
    module.load_state_dict(tensors, strict=False)
    return lines


def config_from(path: Path) -> Config:
    config = Config()
    config.ModelParam.init_from = str(path)
    return config


@pytest.mark.parametrize("suffix", [".params", ".safetensors"])
def test_fine_tuning_from_mxnets_checkpoint(tmp_path: Path, suffix: str) -> None:
    """The file and its conversion give the same tensors, except for the layer of another size."""
    base, module = small_module(num_filter=4, seed=1), small_module(seed=2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    path = tmp_path / "net-0012.params"
    write_params(path, {name: tensor + 1 for name, tensor in base.state_dict().items()} | {"fc_weight": torch.ones(1)})
    if suffix == ".safetensors":
        convert(path, path := path.with_suffix(suffix))
    summary, *others = load(module, config_from(path))
    assert summary == f"fine-tuning {path}: 5 of 7 tensors loaded, the others are random"
    assert others[0] == "1 not expected: fc_weight"
    assert others[1].startswith("2 of another shape: cls_pred_weight (expected (2, 3, 1, 1), got (4, 3, 1, 1))")
    for name, tensor in module.state_dict().items():
        kept = before[name] if name.startswith("cls_pred") else base.state_dict()[name] + 1
        assert torch.equal(tensor, kept), name


@pytest.mark.parametrize("content, message", [(b"", "24 bytes are claimed, 0 are left"), (None, "no file")])
def test_a_bad_file_changes_nothing(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "net-0012.params"
    if content is not None:
        path.write_bytes(content)
    module = small_module()
    before: dict[str, Any] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(module, config_from(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_an_arrays_list_is_no_checkpoint() -> None:
    with pytest.raises(ValueError, match="arrays without names"):
        load_given_weights(Path(__file__).parents[2] / "golden" / "mxnet191_list.params")


class _Own(MSRAResNetV1FPN):
    """A user's class, derived from the v1 backbone."""


@pytest.mark.parametrize(
    "backbone, message",
    [
        (MSRAResNetV1FPN, "holds a ResNet v1b, .* give it SimpleDet's resnet-v1"),
        (_Own, "holds a ResNet v1b, .* give it SimpleDet's resnet-v1"),
        (MSRAResNetV1bFPN, r"does not fit this model:\s+5 missing"),
        (object, r"does not fit this model:\s+5 missing"),
    ],
)
def test_the_backbones_class_determines_the_variant(tmp_path: Path, backbone: type, message: str) -> None:
    torch.save({"layer1.0.conv3.weight": torch.zeros(1)}, tmp_path / "a.pth")
    config = Config()
    config.ModelParam.backbone = backbone
    config.ModelParam.pretrain.prefix = str(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        load(small_module(), config)


def test_the_default_path_follows_the_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config()
    for backbone, place in ((MSRAResNetV1FPN, "resnet-v1-50"), (MSRAResNetV1bFPN, "resnet50_v1b")):
        config.ModelParam.backbone = backbone
        with pytest.raises(FileNotFoundError, match=rf"no pretrained backbone pretrain_model/{place}\.safetensors"):
            load(small_module(), config)
