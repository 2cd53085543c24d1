"""Backbones in MXNet's files: SimpleDet's, with our names, and GluonCV's in both of its layouts.

golden/gluoncv_resnet18_v1b.json has the names that GluonCV 0.10.5 with MXNet 1.9.1 writes for its resnet18_v1b: as
`save_parameters` does (parameters) and as `export` does (exported).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.params_file import ParamsFile, SavedArray, write_params, write_params_file
from core.pretrain import find_backbone, load_backbone, read_backbone, rename_exported, rename_layer
from tests.core.test_pretrain import UNITS, expected_shapes, golden_shapes, torchvision_shapes

NAMES = json.loads((Path(__file__).parents[1] / "golden" / "gluoncv_resnet18_v1b.json").read_text())
FIELDS = {"weight": "gamma", "bias": "beta"}


def gluon_names(depth: int) -> dict[str, str]:
    """Names in GluonCV's parameter files, by torchvision's."""
    names = [name for name in torchvision_shapes(depth) if not name.endswith("num_batches_tracked")]
    return {name: _gluon_name(name) for name in names}


def _gluon_name(name: str) -> str:
    module, _, field = name.rpartition(".")
    is_norm = "bn" in module or module.endswith("downsample.1")
    return f"{module}.{FIELDS.get(field, field)}" if is_norm else name


def exported_names(depth: int) -> Iterator[tuple[str, str]]:
    """GluonCV's names of every tensor but the classifier's: in parameter files, and exported."""
    convs = 2 if depth < 50 else 3

    def both(saved: tuple[str, str], exported: str, number: int) -> Iterator[tuple[str, str]]:
        yield f"{saved[0]}.weight", f"arg:resnetv1b_{exported}conv{number}_weight"
        for field in ("gamma", "beta", "running_mean", "running_var"):
            kind = "aux" if "running" in field else "arg"
            yield f"{saved[1]}.{field}", f"{kind}:resnetv1b_{exported}batchnorm{number}_{field}"

    yield from both(("conv1", "bn1"), "", 0)
    for stage, units in enumerate(UNITS[depth], start=1):
        if stage > 1 or convs == 3:
            shortcut = f"layer{stage}.0.downsample"
            yield from both((f"{shortcut}.0", f"{shortcut}.1"), f"down{stage}_", 0)
        for i in range(units * convs):
            unit, place = f"layer{stage}.{i // convs}", i % convs + 1
            yield from both((f"{unit}.conv{place}", f"{unit}.bn{place}"), f"layers{stage}_", i)


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """With the names as they are."""
    write_params_file(path, ParamsFile([SavedArray(tensor) for tensor in tensors.values()], list(tensors)))


def numbered(names: Iterator[str] | list[str], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Under each name a tensor of one element repeated, its place in the list."""
    return {name: torch.full(shapes[name], float(i)) for i, name in enumerate(names)}


def test_the_names_made_here_are_those_that_gluoncv_writes() -> None:
    assert list(gluon_names(18).values()) == NAMES["parameters"]
    classifier = {"arg:resnetv1b_dense0_weight", "arg:resnetv1b_dense0_bias"}
    assert {exported for _, exported in exported_names(18)} | classifier == set(NAMES["exported"])


@pytest.mark.parametrize("depth", [18, 50])
def test_both_layouts_of_gluoncv_give_the_same_backbone(tmp_path: Path, depth: int) -> None:
    shapes = {gluon: torchvision_shapes(depth)[name] for name, gluon in gluon_names(depth).items()}
    stored = numbered(list(shapes), shapes)
    exported = {name: stored[saved] for saved, name in exported_names(depth)}
    classifier = {f"arg:resnetv1b_dense0_{field}": stored[f"fc.{field}"] for field in ("weight", "bias")}
    save(tmp_path / "a.params", stored)
    save(tmp_path / "b-0000.params", exported | classifier)
    expected = golden_shapes() if depth == 50 else expected_shapes(depth)
    one, line = load_backbone(tmp_path / "a.params", expected)
    other, _ = load_backbone(tmp_path / "b-0000.params", expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["stage2_unit1_sc_bn_moving_var"], stored["layer2.0.downsample.1.running_var"])
    assert torch.equal(one["stage4_unit2_bn1_gamma"], stored["layer4.1.bn1.gamma"])
    assert line.endswith(f"tensors of ResNet-{depth} from {tmp_path / 'a.params'}, 2 others ignored")


def test_simpledets_backbone_has_our_names(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in golden_shapes().items() if name.startswith(("conv0", "bn0", "stage"))}
    stored = numbered(list(shapes), shapes)
    write_params(tmp_path / "resnet50_v1b-0000.params", stored | {"fc1_weight": torch.ones(3, 2048)})
    tensors, line = load_backbone(tmp_path / "resnet50_v1b-0000.params", golden_shapes())
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    assert line.endswith("1 others ignored")


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("resnetv1b_conv0_weight", "conv0_weight"),
        ("resnetv1b0_batchnorm0_running_mean", "bn0_moving_mean"),
        ("resnetv1b_layers3_conv17_weight", "stage3_unit6_conv3_weight"),
        ("resnetv1b_layers1_batchnorm3_beta", "stage1_unit2_bn1_beta"),
        ("resnetv1b_down4_conv0_weight", "stage4_unit1_sc_weight"),
        ("resnetv1b_down4_batchnorm0_gamma", "stage4_unit1_sc_bn_gamma"),
        ("resnetv1b_conv1_weight", None),
        ("resnetv1b_down4_conv1_weight", None),
        ("resnetv1b_conv0_bias", None),
        ("resnetv1b_batchnorm0_moving_mean", None),
        ("resnetv1c_conv0_weight", None),
        ("resnetv1_conv0_weight", None),
        (f"resnetv1b_layers{'1' * 5000}_conv0_weight", None),
    ],
)
def test_exported_names(theirs: str, ours: str | None) -> None:
    assert rename_exported(theirs, is_bottleneck=True) == ours


def test_basic_units_have_two_convolutions() -> None:
    assert rename_exported("resnetv1b_layers1_conv3_weight", is_bottleneck=False) == "stage1_unit2_conv2_weight"


def test_gluons_fields() -> None:
    assert rename_layer("layer1.0.downsample.1.gamma") == "stage1_unit1_sc_bn_gamma"
    assert rename_layer("bn1.beta") == "bn0_beta"
    assert rename_layer("conv1.gamma") is None


@pytest.mark.parametrize("name", ["features.0.weight", "conv1.0.weight", "resnetv1d_conv0_weight"])
def test_gluoncvs_other_resnets_are_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.params", {"bn1.gamma": torch.ones(1), name: torch.ones(1)})
    with pytest.raises(ValueError, match=f"GluonCV's .*it holds {name}.*resnet50_v1 do not"):
        read_backbone(tmp_path / "a.params")


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.params", {"conv1.weight": torch.ones(1), "conv0_weight": torch.ones(1)})
    with pytest.raises(ValueError, match="conv0_weight under two names"):
        read_backbone(tmp_path / "a.params")


def test_the_file_that_simpledet_looks_for_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("pretrain_model/resnet50_v1b-0000.params")
    path.parent.mkdir()
    path.touch()
    assert find_backbone(None, 50) == find_backbone("pretrain_model/resnet50_v1b", 50) == path
