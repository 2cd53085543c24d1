"""First weights of the backbone: ResNets trained on ImageNet, in torchvision's or GluonCV's layout or in ours.

torchvision's (and timm's plain) ResNets have the stride on the 3x3 convolution, as v1b has. GluonCV's v1b comes in two
layouts: its parameter files follow the layers (layer1.0.bn1.gamma), its exported ones count them by stage
(resnetv1b_layers1_batchnorm0_gamma). SimpleDet's backbones have the names that we have.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoint import check_fit, read_tensors
from core.params_file import read_params

DEFAULT_PREFIX = "pretrain_model/resnet{depth}_v1b"
SUFFIXES = (".safetensors", ".pth", "-0000.params", ".params")
_HARMLESS_CLAIM = 2**30  # bytes; ResNet-152 has a quarter of them

_OURS = re.compile(r"(conv0|bn0|stage\d+_unit\d+)_")
_UNIT = re.compile(r"layer(\d{1,3})\.(\d{1,3})\.(conv\d|bn\d|downsample\.0|downsample\.1)$")
_EXPORTED = re.compile(r"resnetv1b\d{0,3}_(?:(layers|down)(\d{1,3})_)?(conv|batchnorm)(\d{1,3})_(\w+)$")
_EXPORTED_BOTTLENECK = re.compile(r"resnetv1b\d{0,3}_down1_")  # only bottlenecks widen the first stage
# the classifier, and a counter that MXNet does not have
_IGNORED = re.compile(r"fc\.|resnetv1b\d{0,3}_dense0_|.*\.num_batches_tracked$")
_NORM_FIELD = {
    **{"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"},
    **{"gamma": "gamma", "beta": "beta"},
}
_DEPTH_OF_UNITS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def find_backbone(prefix: str | None, depth: int) -> Path:
    """The file that ModelParam.pretrain.prefix means: a path, with or without its suffix; None: the usual
    one.

    Raises:
        FileNotFoundError: there is none; the message says how to get it, or how to do without.
    """
    chosen = DEFAULT_PREFIX.format(depth=depth) if prefix is None else prefix
    for path in (Path(chosen), *(Path(chosen + suffix) for suffix in SUFFIXES)):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no pretrained backbone {chosen}.safetensors, .pth or -0000.params. Get one: python3 utils/get_backbone.py "
        f"--depth {depth}; or set ModelParam.pretrain.prefix to yours; or train from scratch: "
        "--set ModelParam.from_scratch=True"
    )


def backbone_names(names: Iterable[str]) -> list[str]:
    """Those parameters and auxiliary states that belong to the backbone, under our names."""
    return [name for name in names if _OURS.match(name)]


def rename_layer(name: str) -> str | None:
    """Our name of a tensor in torchvision's ResNet layout or that of GluonCV's parameter files, which differ in the
    fields of a BatchNorm; None where the layouts have no such name.

    >>> rename_layer("layer2.0.downsample.1.running_var")
    'stage2_unit1_sc_bn_moving_var'
    """
    module, _, field = name.rpartition(".")
    if module in ("conv1", "bn1"):
        ours = module.replace("1", "0")
    else:
        match = _UNIT.match(module)
        if match is None:
            return None
        part = {"downsample.0": "sc", "downsample.1": "sc_bn"}.get(match[3], match[3])
        ours = f"stage{match[1]}_unit{int(match[2]) + 1}_{part}"
    if "bn" in ours:
        return f"{ours}_{_NORM_FIELD[field]}" if field in _NORM_FIELD else None
    return f"{ours}_{field}" if field == "weight" else None


def rename_exported(name: str, is_bottleneck: bool) -> str | None:
    """Our name of a tensor in the layout that GluonCV's v1b networks are exported in; None where it has no such name.

    It counts a stage's convolutions through its units, which have three of them (bottlenecks) or two.

    >>> rename_exported("resnetv1b_layers2_batchnorm4_running_var", is_bottleneck=True)
    'stage2_unit2_bn2_moving_var'
    """
    match = _EXPORTED.match(name)
    if match is None:
        return None
    block, stage, kind, number, field = match.groups()
    part = {"conv": "conv", "batchnorm": "bn"}[kind]
    if block == "layers":
        unit, place = divmod(int(number), 3 if is_bottleneck else 2)
        ours = f"stage{stage}_unit{unit + 1}_{part}{place + 1}"
    elif number != "0":
        return None
    elif block == "down":
        ours = f"stage{stage}_unit1_" + {"conv": "sc", "bn": "sc_bn"}[part]
    else:
        ours = f"{part}0"
    if part == "bn":
        return f"{ours}_{_NORM_FIELD[field]}" if field in _NORM_FIELD else None
    return f"{ours}_{field}" if field == "weight" else None


def depth_of(names: Iterable[str]) -> int | None:
    """Which ResNet the names (ours) belong to; None for no published one."""
    names = set(names)
    units = tuple(
        sum(f"stage{stage}_unit{unit}_conv1_weight" in names for unit in range(1, 100)) for stage in range(1, 5)
    )
    return _DEPTH_OF_UNITS.get(("stage1_unit1_conv3_weight" in names, units))


def load_backbone(path: str | Path, expected: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], str]:
    """The backbone's tensors under our names, and a line for the log.

    Args:
        path: .safetensors, .pth or .params in one of the layouts, or with our names (a checkpoint serves too).
        expected: shape of every parameter and auxiliary state of the model; those outside the backbone are
            ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or in another layout, or the backbone is of another depth or width.
    """
    tensors, ignored = read_backbone(path)
    _require_backbone(path, tensors, expected)
    line = f"backbone: {len(tensors)} tensors of ResNet-{depth_of(tensors)} from {path}"
    return tensors, line + (f", {ignored} others ignored" if ignored else "")


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], int]:
    """The backbone's tensors under our names as float32, and how many others the file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or in another layout.
    """
    path = Path(path)
    stored = _read_stored(path)
    is_ours = bool(backbone_names(stored))
    is_bottleneck = any(_EXPORTED_BOTTLENECK.match(name) for name in stored)
    tensors: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in stored.items():
        new_name = name if _OURS.match(name) else rename_layer(name) or rename_exported(name, is_bottleneck)
        if new_name in tensors:
            raise ValueError(f"{path} holds {new_name} under two names, one of them {name}: give another file")
        if new_name is not None:
            tensors[new_name] = tensor.float()
        elif not (is_ours or _IGNORED.match(name)):
            unknown.append(name)
    if unknown or not tensors:
        raise ValueError(
            f"{path} is not a ResNet in torchvision's layout or GluonCV's (conv1.weight, layer1.0.conv1.weight, ...): "
            f"it holds {', '.join((unknown or list(stored))[:4]):.200}. Plain ResNets fit (timm/resnet50.tv_in1k, "
            "GluonCV's resnet50_v1b); ResNet-C, -D and -X and GluonCV's resnet50_v1 do not"
        )
    return tensors, len(stored) - len(tensors)


def _read_stored(path: Path) -> dict[str, Tensor]:
    match path.suffix:
        case ".pth" | ".pt":
            return _read_state_dict(path)
        case ".params":
            return read_params(path)
    return read_tensors(path)


def _require_backbone(path: str | Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {name: expected[name] for name in backbone_names(expected)}
    report = check_fit(wanted, tensors)
    if report.fits:
        return
    found, asked = depth_of(tensors), depth_of(wanted)
    if found is not None and found != asked:
        advice = f"the file holds ResNet-{found}: set BackboneParam.depth={found} or give another file"
    elif report.different:
        advice = "published weights need BackboneParam.num_filter=64; or set ModelParam.from_scratch=True"
    else:
        advice = "give another file, or set ModelParam.from_scratch=True"
    differences = "\n  ".join(report.lines())
    raise ValueError(f"the backbone in {path} does not fit this model:\n  {differences}\n{advice}")


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: set ModelParam.pretrain.prefix")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _require_claim(path, sum(entry.file_size for entry in archive.infolist()))
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except _ClaimError:
        raise
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise ValueError(
            f"{path} is damaged, or holds more than tensors (code in a pickled file is never run). Save a "
            "plain state dict: torch.save(model.state_dict(), ...)"
        ) from error
    if not isinstance(stored, dict) or not all(map(_is_plain, stored.keys(), stored.values())):
        raise ValueError(f"{path} must hold a plain state dict, names to tensors: torch.save(model.state_dict(), ...)")
    _require_claim(path, sum(tensor.numel() * tensor.element_size() for tensor in stored.values()))
    return stored


class _ClaimError(ValueError):
    """A file that claims more than it holds."""


def _require_claim(path: Path, claimed: int) -> None:
    """What is unpacked or copied must lie in the file: a packed one, or a view of one number, can claim terabytes."""
    size = path.stat().st_size
    if claimed > max(size, _HARMLESS_CLAIM):
        raise _ClaimError(
            f"{path} is damaged: its tensors claim {claimed} bytes, the file has {size}. Save a plain state dict: "
            "torch.save(model.state_dict(), ...)"
        )


def _is_plain(name: object, value: object) -> bool:
    """A name, and a tensor of real numbers in memory: not sparse, quantised, complex or without data."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex() or value.is_nested)
    )
