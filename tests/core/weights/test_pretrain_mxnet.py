"""Backbones in MXNet's files: SimpleDet's, with our names, GluonCV's and MXNet's own, each in two layouts.

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

from core.weights.params_file import ParamsFile, SavedArray, write_params, write_params_file
from core.weights.pretrain import find_backbone, load_backbone, read_backbone
from tests.core.weights.test_pretrain import UNITS, expected_shapes, golden_shapes, torchvision_shapes

NAMES = json.loads((Path(__file__).parents[2] / "golden" / "gluoncv_resnet18_v1b.json").read_text())
FIELDS = {"weight": "gamma", "bias": "beta"}


def gluon_names(depth: int) -> dict[str, str]:
    """Return names in GluonCV's parameter files by torchvision's."""
    names = [name for name in torchvision_shapes(depth) if not name.endswith("num_batches_tracked")]
    return {name: _gluon_name(name) for name in names}


def _gluon_name(name: str) -> str:
    module, _, field = name.rpartition(".")
    is_norm = "bn" in module or module.endswith("downsample.1")
    return f"{module}.{FIELDS.get(field, field)}" if is_norm else name


def exported_names(depth: int) -> Iterator[tuple[str, str]]:
    """Return GluonCV's names of every tensor but the classifier's: in parameter files, and exported."""
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
    """Save the tensors with their names unchanged."""
    write_params_file(path, ParamsFile([SavedArray(tensor) for tensor in tensors.values()], list(tensors)))


def numbered(names: Iterator[str] | list[str], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return a tensor for each name, filled with the name's position in the list."""
    return {name: torch.full(shapes[name], float(i)) for i, name in enumerate(names)}


def test_the_generated_names_are_those_that_gluoncv_writes() -> None:
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
    one, line = load_backbone(tmp_path / "a.params", expected, "v1b")
    other, _ = load_backbone(tmp_path / "b-0000.params", expected, "v1b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["stage2_unit1_sc_bn_moving_var"], stored["layer2.0.downsample.1.running_var"])
    assert torch.equal(one["stage4_unit2_bn1_gamma"], stored["layer4.1.bn1.gamma"])
    assert line.endswith(f"tensors of ResNet-{depth} from {tmp_path / 'a.params'}, 2 others ignored")


def test_simpledets_backbone_has_our_names(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in golden_shapes().items() if name.startswith(("conv0", "bn0", "stage"))}
    stored = numbered(list(shapes), shapes)
    write_params(tmp_path / "resnet50_v1b-0000.params", stored | {"fc1_weight": torch.ones(3, 2048)})
    tensors, line = load_backbone(tmp_path / "resnet50_v1b-0000.params", golden_shapes(), "v1b")
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    assert line.endswith("1 others ignored")


def zoo_names(depth: int) -> Iterator[tuple[str, str, str]]:
    """Every tensor of MXNet's own resnet<depth>_v1: our name, that in its parameter file, and that exported. Its
    tests/mxnet twin meets the real files."""
    places = ((0, True), (3, False), (6, True)) if depth >= 50 else ((0, False), (3, False))  # layer, has a bias

    def both(
        ours: tuple[str, str], saved: tuple[str, str], exported: str, number: int
    ) -> Iterator[tuple[str, str, str]]:
        yield f"{ours[0]}_weight", f"{saved[0]}.weight", f"arg:resnetv10_{exported}conv{number}_weight"
        for field in ("gamma", "beta"):
            yield f"{ours[1]}_{field}", f"{saved[1]}.{field}", f"arg:resnetv10_{exported}batchnorm{number}_{field}"
        for field in ("mean", "var"):
            exported_name = f"aux:resnetv10_{exported}batchnorm{number}_running_{field}"
            yield f"{ours[1]}_moving_{field}", f"{saved[1]}.running_{field}", exported_name

    yield from both(("conv0", "bn0"), ("features.0", "features.1"), "", 0)
    for stage, units in enumerate(UNITS[depth], start=1):
        count = 0
        for i in range(units):
            unit, theirs, exported = f"stage{stage}_unit{i + 1}", f"features.{stage + 3}.{i}", f"stage{stage}_"
            for step, (layer, has_bias) in enumerate(places, start=1):
                saved = (f"{theirs}.body.{layer}", f"{theirs}.body.{layer + 1}")
                yield from both((f"{unit}_conv{step}", f"{unit}_bn{step}"), saved, exported, count)
                if has_bias:
                    yield f"{unit}_conv{step}_bias", f"{saved[0]}.bias", f"arg:resnetv10_{exported}conv{count}_bias"
                count += 1
            if i == 0 and (stage > 1 or depth >= 50):
                saved = (f"{theirs}.downsample.0", f"{theirs}.downsample.1")
                yield from both((f"{unit}_sc", f"{unit}_sc_bn"), saved, exported, count)
                count += 1


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("depth", [18, 50])
def test_mxnets_own_resnets(tmp_path: Path, depth: int, exported: bool) -> None:
    """A bias is folded into the mean of the next BatchNorm; basic blocks have none, and determine no variant."""
    stored = {ours: torch.rand(3) for ours, *_ in zoo_names(depth)}
    theirs = {names[1 + exported]: stored[names[0]] for names in zoo_names(depth)}
    save(tmp_path / "a.params", {**theirs, "arg:resnetv10_dense0_bias" if exported else "output.bias": torch.ones(5)})
    found = read_backbone(tmp_path / "a.params")
    assert found.num_ignored == 1
    assert found.variants == (frozenset() if depth == 18 else {"v1"})
    assert found.tensors.keys() == expected_shapes(depth).keys()
    biases = {name for name in stored if name.endswith("_bias")}
    assert len(biases) == (0 if depth == 18 else 32)
    moved = {name.replace("conv", "bn").replace("_bias", "_moving_mean"): stored[name] for name in biases}
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, stored[name] - moved.get(name, torch.zeros(3))), name


def test_mxnets_own_bottlenecks_are_not_those_of_v1b(tmp_path: Path) -> None:
    save(tmp_path / "a.params", {saved: torch.ones(1) for _, saved, _ in zoo_names(101)})
    message = (
        r"a\.params holds a ResNet v1, with a bottleneck's stride on its first, 1x1 convolution, .* v1b, .*: give it "
        r"torchvision's, timm's resnet101\.tv_in1k, .*; or set ModelParam\.backbone = MSRAResNetV1FPN$"
    )
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path / "a.params", golden_shapes(), "v1b")


def test_a_bias_of_another_shape_is_refused(tmp_path: Path) -> None:
    shapes = expected_shapes(18)
    stored = {name: torch.zeros(shape) for name, shape in shapes.items()} | {"stage1_unit1_conv1_bias": torch.ones(1)}
    write_params(tmp_path / "a.params", stored)
    with pytest.raises(ValueError, match="1 not expected: stage1_unit1_conv1_bias"):
        load_backbone(tmp_path / "a.params", shapes, "v1b")


@pytest.mark.parametrize(
    "name",
    [
        "features.0.gamma",
        "features.4.0.se.0.weight",
        "conv1.0.weight",
        "resnetv1d_conv0_weight",
        "resnetv20_conv0_weight",
    ],
)
def test_other_resnets_are_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.params", {"bn1.gamma": torch.ones(1), name: torch.ones(1)})
    with pytest.raises(ValueError, match=f"GluonCV's or MXNet's .*it holds {name}.*-D, -X and -v2 do not"):
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
    assert find_backbone(None, 50, "v1b") == find_backbone("pretrain_model/resnet50_v1b", 50, "v1b") == path
