"""Backbones in torchvision's layout, with the real names and shapes of the published architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from core.pretrain import depth_of, find_backbone, load_backbone, read_backbone, rename_layer

GOLDEN = Path(__file__).parents[1] / "golden" / "fpn_128.json"
UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def torchvision_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Every entry of the state dict of torchvision's resnet<depth>, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, channels: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, channels, kernel, kernel)

    def norm(name: str, channels: int) -> None:
        for field in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{field}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    expansion = 1 if depth < 50 else 4
    channels = 64
    for stage, units in enumerate(UNITS[depth]):
        width = 64 * 2**stage
        for unit in range(units):
            prefix = f"layer{stage + 1}.{unit}"
            plan = [(width, channels, 3), (width, width, 3)]
            if expansion == 4:
                plan = [(width, channels, 1), (width, width, 3), (4 * width, width, 1)]
            for i, (out, into, kernel) in enumerate(plan, start=1):
                conv(f"{prefix}.conv{i}", out, into, kernel)
                norm(f"{prefix}.bn{i}", out)
            if channels != width * expansion:
                conv(f"{prefix}.downsample.0", width * expansion, channels, 1)
                norm(f"{prefix}.downsample.1", width * expansion)
            channels = width * expansion
    shapes["fc.weight"] = (1000, channels)
    shapes["fc.bias"] = (1000,)
    return shapes


def make_state_dict(depth: int) -> dict[str, Tensor]:
    """Every tensor is filled with its own random number."""
    generator = torch.Generator().manual_seed(depth)
    return {
        name: torch.rand((), generator=generator).expand(shape).clone()
        for name, shape in torchvision_shapes(depth).items()
    }


def golden_shapes() -> dict[str, tuple[int, ...]]:
    """Every parameter and auxiliary state of the original FPN on ResNet-50."""
    golden = json.loads(GOLDEN.read_text())
    shapes = golden["arguments"] | golden["auxiliary_states"]
    return {name: tuple(shape) for name, shape in shapes.items()}


def expected_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Our names of the backbone, for the depths that have no golden file."""
    renamed = {rename_layer(name): shape for name, shape in torchvision_shapes(depth).items()}
    return {name: shape for name, shape in renamed.items() if name is not None}


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("conv1.weight", "conv0_weight"),
        ("bn1.weight", "bn0_gamma"),
        ("bn1.bias", "bn0_beta"),
        ("bn1.running_mean", "bn0_moving_mean"),
        ("bn1.running_var", "bn0_moving_var"),
        ("layer1.0.conv1.weight", "stage1_unit1_conv1_weight"),
        ("layer3.22.bn3.running_var", "stage3_unit23_bn3_moving_var"),
        ("layer2.0.downsample.0.weight", "stage2_unit1_sc_weight"),
        ("layer2.0.downsample.1.weight", "stage2_unit1_sc_bn_gamma"),
        ("layer2.0.downsample.1.running_mean", "stage2_unit1_sc_bn_moving_mean"),
        ("bn1.num_batches_tracked", None),
        ("fc.weight", None),
        ("layer1.0.se.fc1.weight", None),
        ("layer1.0.downsample.2.weight", None),
        ("conv1.0.weight", None),
        ("conv1.bias", None),
        ("module.conv1.weight", None),
    ],
)
def test_names(theirs: str, ours: str | None) -> None:
    assert rename_layer(theirs) == ours


def test_torchvisions_resnet50_fills_the_original_backbone(tmp_path: Path) -> None:
    """The golden file's names and shapes are the original system's: all 265 are found, with their values."""
    stored = make_state_dict(50)
    path = tmp_path / "resnet50_v1b.safetensors"
    safetensors.torch.save_file(stored, path)
    tensors, line = load_backbone(path, golden_shapes())
    assert len(tensors) == 265
    assert line == f"backbone: 265 tensors of ResNet-50 from {path}, 55 others ignored"  # 53 counters and the fc
    for theirs, ours in [
        ("conv1.weight", "conv0_weight"),
        ("layer4.2.bn3.weight", "stage4_unit3_bn3_gamma"),
        ("layer3.0.downsample.1.running_var", "stage3_unit1_sc_bn_moving_var"),
    ]:
        assert torch.equal(tensors[ours], stored[theirs])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_torchvisions_resnet18_in_both_formats(tmp_path: Path, suffix: str) -> None:
    stored = make_state_dict(18)
    path = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save(stored, path)
    else:
        safetensors.torch.save_file(stored, path)
    tensors, line = load_backbone(path, {**expected_shapes(18), "P5_conv_weight": (256, 512, 3, 3)})
    assert "100 tensors of ResNet-18" in line  # 20 convolutions, 20 norms of 4
    assert torch.equal(tensors["stage2_unit1_conv2_weight"], stored["layer2.0.conv2.weight"])
    assert torch.equal(tensors["stage4_unit2_bn2_moving_mean"], stored["layer4.1.bn2.running_mean"])
    assert "P5_conv_weight" not in tensors


def test_our_names_are_taken_as_they_are_and_half_becomes_float(tmp_path: Path) -> None:
    """A checkpoint of a whole detector serves as a backbone."""
    stored = {name: torch.full(shape, 0.5, dtype=torch.float16) for name, shape in golden_shapes().items()}
    safetensors.torch.save_file(stored, tmp_path / "a.safetensors")
    tensors, line = load_backbone(tmp_path / "a.safetensors", golden_shapes())
    assert len(tensors) == 265
    assert tensors["conv0_weight"].dtype == torch.float32
    assert tensors["conv0_weight"].unique().tolist() == [0.5]
    assert f"{len(stored) - 265} others ignored" in line


@pytest.mark.parametrize("depth", UNITS)
def test_the_depth_is_read_from_the_names(depth: int) -> None:
    assert depth_of(expected_shapes(depth)) == depth


@pytest.mark.parametrize("given", [18, 34, 101])
def test_another_depth_is_named(tmp_path: Path, given: int) -> None:
    """34 has the units of 50, and 101 has all the names of 50 and more."""
    stored = {name: torch.zeros(()).expand(shape) for name, shape in torchvision_shapes(given).items()}
    torch.save(stored, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"holds ResNet-{given}: set BackboneParam.depth={given}"):
        load_backbone(tmp_path / "a.pth", golden_shapes())


def test_another_width_is_named(tmp_path: Path) -> None:
    torch.save(make_state_dict(18), tmp_path / "a.pth")
    expected = expected_shapes(18) | {"conv0_weight": (32, 3, 7, 7)}
    with pytest.raises(ValueError, match=r"conv0_weight \(expected \(32, 3, 7, 7\).*\s.*num_filter=64"):
        load_backbone(tmp_path / "a.pth", expected)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    stored = make_state_dict(18)
    del stored["layer3.1.bn2.bias"]
    torch.save(stored, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="1 missing: stage3_unit2_bn2_beta"):
        load_backbone(tmp_path / "a.pth", expected_shapes(18))


@pytest.mark.parametrize("name", ["layer1.0.se.fc1.weight", "conv1.0.weight", "module.conv1.weight"])
def test_another_layout_is_refused(tmp_path: Path, name: str) -> None:
    torch.save(make_state_dict(18) | {name: torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"not a ResNet in torchvision's layout.*it holds {name}"):
        read_backbone(tmp_path / "a.pth")


class Payload:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("code of the file was run",))


@pytest.mark.parametrize("content", ["code", "noise", "empty", "cut"])
def test_a_pth_file_that_is_damaged_or_runs_code_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.pth"
    torch.save(Payload() if content == "code" else {"conv1.weight": torch.zeros(64)}, path)
    if content == "noise":
        path.write_bytes(bytes(range(256)) * 20)
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.pth is damaged, or holds more than tensors"):
        read_backbone(path)


def test_a_wrapped_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": make_state_dict(18), "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="must hold a plain state dict"):
        read_backbone(tmp_path / "a.pth")


def test_the_usual_place_and_given_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain_model").mkdir()
    usual = Path("pretrain_model/resnet50_v1b.pth")
    usual.touch()
    assert find_backbone(None, 50) == usual
    assert find_backbone("pretrain_model/resnet50_v1b", 18) == usual
    assert find_backbone(str(usual), 18) == usual
    usual.with_suffix(".safetensors").touch()
    assert find_backbone(None, 50) == usual.with_suffix(".safetensors")


def test_a_missing_backbone_says_how_to_get_it_and_how_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"utils/get_backbone\.py --depth 101;.*from_scratch=True"):
        find_backbone(None, 101)
    with pytest.raises(FileNotFoundError, match=r"no file a\.pth: set ModelParam.pretrain.prefix"):
        load_backbone("a.pth", golden_shapes())
