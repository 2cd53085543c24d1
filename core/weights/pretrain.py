"""Pretrained weights of the backbone: ResNets trained on ImageNet.

Files have one of the layouts of core.weights.backbone_names, or our names, which are SimpleDet's too.

Weights of v1 and v1b have equal names and shapes, but each is wrong in the other's network. The variant follows from
the layout of a file, except for our names, where it cannot be checked.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.weights.backbone_names import depth_of, has_exported_bottlenecks, is_ignored, is_ours, norm_after, rename
from core.weights.checkpoint import read_tensors
from core.weights.fit import check_fit
from core.weights.params_file import read_params
from models.backbone.resnet import Variant, default_prefix

SUFFIXES = (".safetensors", ".pth", "-0000.params", ".params")
_HARMLESS_CLAIM = 2**30  # bytes; ResNet-152 has a quarter of them


@dataclass(frozen=True)
class _Variant:
    """Texts for errors about a variant of ResNets with bottlenecks; {depth} stands for the network's depth."""

    stride: str  # the convolution with a bottleneck's stride
    files: str  # the files that fit
    get: str  # the way to get one
    backbone: str  # class of models.retinanet.builder


_V1_FILES = "SimpleDet's resnet-v1-{depth}-0000.params, or MXNet's own Gluon resnet{depth}_v1, saved or exported"
_VARIANTS = {
    "v1": _Variant(
        stride="first, 1x1 convolution",
        files=_V1_FILES,
        get=f"What fits is {_V1_FILES}",
        backbone="MSRAResNetV1FPN",
    ),
    "v1b": _Variant(
        stride="3x3 convolution",
        files="torchvision's, timm's resnet{depth}.tv_in1k, or GluonCV's resnet{depth}_v1b, saved or exported",
        get="Get one: python3 utils/get_backbone.py --depth {depth}",
        backbone="MSRAResNetV1bFPN",
    ),
}


@dataclass(frozen=True)
class Backbone:
    """Tensors of a backbone in a file."""

    tensors: dict[str, Tensor]  # under our names, float32
    num_ignored: int  # other tensors of the file
    variants: frozenset[str]  # v1 or v1b, by the layout of the bottlenecks; empty if it does not determine the variant


def find_backbone(prefix: str | None, depth: int, variant: Variant) -> Path:
    """Return the file of ModelParam.pretrain.prefix: a path, with or without its suffix; None: the default path.

    Raises:
        FileNotFoundError: there is none; the message says how to get one, or how to train without.
    """
    chosen = default_prefix(depth, variant) if prefix is None else prefix
    for path in (Path(chosen), *(Path(chosen + suffix) for suffix in SUFFIXES)):
        if path.is_file():
            return path
    get = _VARIANTS[variant].get.format(depth=depth)
    raise FileNotFoundError(
        f"no pretrained backbone {chosen}.safetensors, .pth or -0000.params. {get}; or set "
        "ModelParam.pretrain.prefix to another file; or train from scratch: --set ModelParam.from_scratch=True"
    )


def load_backbone(
    path: str | Path, expected: Mapping[str, tuple[int, ...]], variant: str
) -> tuple[dict[str, Tensor], str]:
    """Return the backbone's tensors under our names, and a line for the log.

    Args:
        path: .safetensors, .pth or .params in one of the layouts, or with our names (such as a checkpoint).
        expected: shape of every parameter and auxiliary state of the model; those outside the backbone are
            ignored.
        variant: "v1" or "v1b", the variant of the model's bottlenecks.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or in another layout, or the backbone is of another variant, depth or width.
    """
    found = read_backbone(path)
    _require_variant(path, found, variant)
    _require_backbone(path, found.tensors, expected)
    line = f"backbone: {len(found.tensors)} tensors of ResNet-{depth_of(found.tensors)} from {path}"
    return found.tensors, line + (f", {found.num_ignored} others ignored" if found.num_ignored else "")


def read_backbone(path: str | Path) -> Backbone:
    """Read the tensors of a backbone in any of the layouts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or in another layout.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt"):
        stored = _read_state_dict(path)
    else:
        stored = read_params(path) if path.suffix == ".params" else read_tensors(path)
    has_our_names, is_bottleneck = any(map(is_ours, stored)), has_exported_bottlenecks(stored)
    tensors: dict[str, Tensor] = {}
    variants, unknown, num_ignored = set(), [], 0
    for name, tensor in stored.items():
        renamed = rename(name, is_bottleneck)
        if renamed is None:
            num_ignored += 1
            if not (has_our_names or is_ignored(name)):
                unknown.append(name)
            continue
        ours, variant = renamed
        if ours in tensors:
            raise ValueError(f"{path} holds {ours} under two names, one of them {name}: give another file")
        tensors[ours] = tensor.float()
        if variant is not None and "_conv3_" in ours:  # basic blocks are equal in both variants
            variants.add(variant)
    if unknown or not tensors:
        raise ValueError(
            f"{path} is not a ResNet in torchvision's layout, GluonCV's or MXNet's (conv1.weight, "
            f"layer1.0.conv1.weight, ...): it holds {', '.join((unknown or list(stored))[:4]):.200}. Plain ResNets fit "
            "(timm/resnet50.tv_in1k, GluonCV's resnet50_v1b, MXNet's resnet50_v1); ResNet-C, -D, -X and -v2 do not"
        )
    return Backbone(_fold_biases(tensors), num_ignored, frozenset(variants))


def _fold_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the convolutions' biases by subtracting them from the moving mean of the BatchNorm that follows, which
    gives the same outputs. With batch statistics a bias cancels, and its gradient is zero."""
    folded = dict(tensors)
    for name, bias in tensors.items():
        mean = f"{norm_after(name)}_moving_mean"
        # a bias of another shape is kept, and refused with the other tensors that do not fit
        if name.endswith("_bias") and mean in tensors and tensors[mean].shape == bias.shape:
            folded[mean] = tensors[mean] - bias
            del folded[name]
    return folded


def _require_variant(path: str | Path, found: Backbone, variant: str) -> None:
    for other in found.variants - {variant}:
        held, asked = _VARIANTS[other], _VARIANTS[variant]
        files = asked.files.format(depth=depth_of(found.tensors) or 50)
        raise ValueError(
            f"{path} holds a ResNet {other}, with a bottleneck's stride on its {held.stride}, but this model's "
            f"backbone is a ResNet {variant}, with the stride on the {asked.stride}: give it {files}; or set "
            f"ModelParam.backbone = {held.backbone}"
        )


def _require_backbone(path: str | Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {name: shape for name, shape in expected.items() if is_ours(name)}
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
    except Exception as error:  # the unpickler raises errors of many types for damaged files
        raise ValueError(
            f"{path} is damaged, or holds more than tensors (code in a pickled file is never run). Save a "
            "plain state dict: torch.save(model.state_dict(), ...)"
        ) from error
    if not isinstance(stored, dict) or not all(map(_is_plain, stored.keys(), stored.values())):
        raise ValueError(f"{path} must hold a plain state dict, names to tensors: torch.save(model.state_dict(), ...)")
    _require_claim(path, sum(tensor.numel() * tensor.element_size() for tensor in stored.values()))
    return stored


class _ClaimError(ValueError):
    """A file whose tensors claim more bytes than it has."""


def _require_claim(path: Path, claimed: int) -> None:
    """Raise _ClaimError for more bytes than the file has: compressed data and strided views can claim terabytes."""
    size = path.stat().st_size
    if claimed > max(size, _HARMLESS_CLAIM):
        raise _ClaimError(
            f"{path} is damaged: its tensors claim {claimed} bytes, the file has {size}. Save a plain state dict: "
            "torch.save(model.state_dict(), ...)"
        )


def _is_plain(name: object, value: object) -> bool:
    """Return True for a name and a dense tensor of real numbers in memory: not sparse, quantised, complex or meta."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex() or value.is_nested)
    )
