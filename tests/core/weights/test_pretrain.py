"""Backbones in torchvision's layout, with the real names and shapes of the published architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from core.weights.backbone_names import rename_layer
from core.weights.pretrain import find_backbone, load_backbone, read_backbone

GOLDEN = Path(__file__).parents[2] / "golden" / "fpn_128.json"
UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def torchvision_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Return every entry of the state dict of torchvision's resnet<depth>, in its order."""
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
    """Return a state dict in which every tensor is filled with its own random number."""
    generator = torch.Generator().manual_seed(depth)
    return {
        name: torch.rand((), generator=generator).expand(shape).clone()
        for name, shape in torchvision_shapes(depth).items()
    }


def golden_shapes() -> dict[str, tuple[int, ...]]:
    """Return every parameter and auxiliary state of the original FPN on ResNet-50."""
    golden = json.loads(GOLDEN.read_text())
    shapes = golden["arguments"] | golden["auxiliary_states"]
    return {name: tuple(shape) for name, shape in shapes.items()}


def expected_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Return our names and shapes of the backbone, for depths without a golden file."""
    renamed = {rename_layer(name): shape for name, shape in torchvision_shapes(depth).items()}
    return {name: shape for name, shape in renamed.items() if name is not None}


def test_torchvisions_resnet50_fills_the_original_backbone(tmp_path: Path) -> None:
    """The golden file's names and shapes are the original system's: all 265 are found, with their values."""
    stored = make_state_dict(50)
    path = tmp_path / "resnet50_v1b.safetensors"
    safetensors.torch.save_file(stored, path)
    tensors, line = load_backbone(path, golden_shapes(), "v1b")
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
    tensors, line = load_backbone(path, {**expected_shapes(18), "P5_conv_weight": (256, 512, 3, 3)}, "v1b")
    assert "100 tensors of ResNet-18" in line  # 20 convolutions, 20 norms of 4
    assert torch.equal(tensors["stage2_unit1_conv2_weight"], stored["layer2.0.conv2.weight"])
    assert torch.equal(tensors["stage4_unit2_bn2_moving_mean"], stored["layer4.1.bn2.running_mean"])
    assert "P5_conv_weight" not in tensors


def test_our_names_are_taken_as_they_are_and_half_becomes_float(tmp_path: Path) -> None:
    """A checkpoint of a whole detector can be used as a backbone."""
    stored = {name: torch.full(shape, 0.5, dtype=torch.float16) for name, shape in golden_shapes().items()}
    safetensors.torch.save_file(stored, tmp_path / "a.safetensors")
    tensors, line = load_backbone(tmp_path / "a.safetensors", golden_shapes(), "v1b")
    assert len(tensors) == 265
    assert tensors["conv0_weight"].dtype == torch.float32
    assert tensors["conv0_weight"].unique().tolist() == [0.5]
    assert f"{len(stored) - 265} others ignored" in line


@pytest.mark.parametrize("given", [18, 34, 101])
def test_another_depth_is_named(tmp_path: Path, given: int) -> None:
    """34 has as many units as 50, and 101 has all the names of 50 and more."""
    stored = {name: torch.zeros(()).expand(shape) for name, shape in torchvision_shapes(given).items()}
    torch.save(stored, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"holds ResNet-{given}: set BackboneParam.depth={given}"):
        load_backbone(tmp_path / "a.pth", golden_shapes(), "v1b")


def test_another_width_is_named(tmp_path: Path) -> None:
    torch.save(make_state_dict(18), tmp_path / "a.pth")
    expected = expected_shapes(18) | {"conv0_weight": (32, 3, 7, 7)}
    with pytest.raises(ValueError, match=r"conv0_weight \(expected \(32, 3, 7, 7\).*\s.*num_filter=64"):
        load_backbone(tmp_path / "a.pth", expected, "v1b")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    stored = make_state_dict(18)
    del stored["layer3.1.bn2.bias"]
    torch.save(stored, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="1 missing: stage3_unit2_bn2_beta"):
        load_backbone(tmp_path / "a.pth", expected_shapes(18), "v1b")


@pytest.mark.parametrize("name", ["layer1.0.se.fc1.weight", "conv1.0.weight", "module.conv1.weight"])
def test_another_layout_is_refused(tmp_path: Path, name: str) -> None:
    torch.save(make_state_dict(18) | {name: torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"not a ResNet in torchvision's layout.*it holds {name}"):
        read_backbone(tmp_path / "a.pth")


class Payload:
    """An object whose unpickling would run code."""

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


def test_the_default_path_and_given_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain_model").mkdir()
    usual = Path("pretrain_model/resnet50_v1b.pth")
    usual.touch()
    assert find_backbone(None, 50, "v1b") == usual
    assert find_backbone("pretrain_model/resnet50_v1b", 18, "v1b") == usual
    assert find_backbone(str(usual), 18, "v1b") == usual
    usual.with_suffix(".safetensors").touch()
    assert find_backbone(None, 50, "v1b") == usual.with_suffix(".safetensors")


def test_v1_has_a_default_path_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain_model").mkdir()
    Path("pretrain_model/resnet50_v1b.pth").touch()
    with pytest.raises(
        FileNotFoundError, match=r"resnet-v1-50\.safetensors.*SimpleDet's .*MXNet's own Gluon resnet50_v1"
    ):
        find_backbone(None, 50, "v1")
    usual = Path("pretrain_model/resnet-v1-50-0000.params")
    usual.touch()
    assert find_backbone(None, 50, "v1") == find_backbone("pretrain_model/resnet-v1-50", 101, "v1b") == usual


def test_a_missing_backbone_is_an_error_with_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"utils/get_backbone\.py --depth 101;.*from_scratch=True"):
        find_backbone(None, 101, "v1b")
    with pytest.raises(FileNotFoundError, match=r"no file a\.pth: set ModelParam.pretrain.prefix"):
        load_backbone("a.pth", golden_shapes(), "v1b")


def test_torchvisions_bottlenecks_are_not_those_of_v1(tmp_path: Path) -> None:
    torch.save(make_state_dict(50), tmp_path / "a.pth")
    message = (
        r"a\.pth holds a ResNet v1b, with a bottleneck's stride on its 3x3 convolution, but this model's backbone is a "
        r"ResNet v1, with the stride on the first, 1x1 convolution: give it SimpleDet's resnet-v1-50-0000\.params, .*; "
        r"or set ModelParam\.backbone = MSRAResNetV1bFPN$"
    )
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path / "a.pth", golden_shapes(), "v1")


def test_our_own_names_are_accepted_for_both_variants(tmp_path: Path) -> None:
    """Checkpoints of v1 and v1b have the same names."""
    stored = {name: torch.zeros(shape) for name, shape in golden_shapes().items()}
    safetensors.torch.save_file(stored, tmp_path / "a.safetensors")
    for variant in ("v1", "v1b"):
        assert len(load_backbone(tmp_path / "a.safetensors", golden_shapes(), variant)[0]) == 265
