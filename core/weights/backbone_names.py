"""Tensor names of a ResNet in the layouts of published pretrained weights, and the conversion to ours.

| layout | a name | its bottlenecks |
|---|---|---|
| torchvision's, timm's plain ResNets | layer1.0.bn1.weight | v1b |
| GluonCV's resnet50_v1b, saved | layer1.0.bn1.gamma | v1b |
| the same, exported | resnetv1b_layers1_batchnorm0_gamma | v1b |
| MXNet's (and GluonCV's) resnet50_v1, saved | features.4.0.body.1.gamma | v1 |
| the same, exported | resnetv10_stage1_batchnorm0_gamma | v1 |

Only MXNet's resnet50_v1 has biases, in its 1x1 convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_OURS = re.compile(r"(conv0|bn0|stage\d+_unit\d+)_")
_UNIT = re.compile(r"layer(\d{1,3})\.(\d{1,3})\.(conv\d|bn\d|downsample\.0|downsample\.1)$")
_EXPORTED = re.compile(r"resnetv1b\d{0,3}_(?:(layers|down)(\d{1,3})_)?(conv|batchnorm)(\d{1,3})_(\w+)$")
_ZOO_UNIT = re.compile(r"features\.([4-7])\.(\d{1,3})\.(?:body\.([013467])|downsample\.([01]))$")
_ZOO_STEM = {"features.0": "conv0", "features.1": "bn0"}
_ZOO_EXPORTED = re.compile(r"resnetv1\d{0,3}_(?:stage(\d{1,3})_)?(conv|batchnorm)(\d{1,3})_(\w+)$")
# only bottlenecks have a projection shortcut in the first stage, and only they have biases
_IS_BOTTLENECK = re.compile(r"resnetv1b\d{0,3}_down1_|resnetv1\d{0,3}_stage1_conv0_bias$")
# the classifier, and a counter that MXNet does not have
_IGNORED = re.compile(r"(?:fc|output)\.|resnetv1b?\d{0,3}_dense0_|.*\.num_batches_tracked$")
_NORM_FIELD = {
    "weight": "gamma",
    "bias": "beta",
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_var",
}
_DEPTH_OF_UNITS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def is_ours(name: str) -> bool:
    """Return True if a parameter or auxiliary state with this name of ours belongs to the backbone."""
    return _OURS.match(name) is not None


def is_ignored(name: str) -> bool:
    """Return True for a tensor of a known layout that a backbone does not need."""
    return _IGNORED.match(name) is not None


def has_exported_bottlenecks(names: Iterable[str]) -> bool:
    """Return True if exported names are those of bottlenecks; they number convolutions through a stage's units."""
    return any(_IS_BOTTLENECK.match(name) for name in names)


def depth_of(names: Iterable[str]) -> int | None:
    """Return the depth of the published ResNet with these names (ours); None if there is none."""
    names = set(names)
    units = tuple(
        sum(f"stage{stage}_unit{unit}_conv1_weight" in names for unit in range(1, 100)) for stage in range(1, 5)
    )
    return _DEPTH_OF_UNITS.get(("stage1_unit1_conv3_weight" in names, units))


def rename(name: str, is_bottleneck: bool) -> tuple[str, str | None] | None:
    """Return our name of a tensor and the variant of the layout's bottlenecks (None: our own names are used for both);
    None for a name of no layout. `is_bottleneck` is has_exported_bottlenecks of all the names.

    >>> rename("features.5.0.body.6.bias", is_bottleneck=False)
    ('stage2_unit1_conv3_bias', 'v1')
    """
    if is_ours(name):
        return name, None
    ours = rename_layer(name) or rename_exported(name, is_bottleneck)
    if ours is not None:
        return ours, "v1b"
    ours = rename_zoo(name) or rename_zoo_exported(name, is_bottleneck)
    return None if ours is None else (ours, "v1")


def rename_layer(name: str) -> str | None:
    """Return our name of a tensor in the layout of torchvision's ResNets or GluonCV's v1b parameter files, which differ
    in the fields of a BatchNorm; None for any other name.

    >>> rename_layer("layer2.0.downsample.1.running_var")
    'stage2_unit1_sc_bn_moving_var'
    """
    module, _, field = name.rpartition(".")
    if module in ("conv1", "bn1"):
        return _with_field(module.replace("1", "0"), field)
    match = _UNIT.match(module)
    if match is None:
        return None
    part = {"downsample.0": "sc", "downsample.1": "sc_bn"}.get(match[3], match[3])
    return _with_field(f"stage{match[1]}_unit{int(match[2]) + 1}_{part}", field)


def rename_exported(name: str, is_bottleneck: bool) -> str | None:
    """Return our name of a tensor in the layout of GluonCV's exported v1b networks; None for any other name.

    Convolutions are numbered through the units of a stage, which have three of them (bottlenecks) or two.

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
        return _with_field(f"stage{stage}_unit{unit + 1}_{part}{place + 1}", field)
    if number != "0":
        return None
    if block == "down":
        return _with_field(f"stage{stage}_unit1_" + {"conv": "sc", "bn": "sc_bn"}[part], field)
    return _with_field(f"{part}0", field)


def rename_zoo(name: str) -> str | None:
    """Return our name of a tensor in the parameter files of MXNet's resnet50_v1; None for any other name.

    A unit's layers are numbered: convolution, BatchNorm, activation, and again.

    >>> rename_zoo("features.4.0.body.7.gamma")
    'stage1_unit1_bn3_gamma'
    """
    module, _, field = name.rpartition(".")
    if module in _ZOO_STEM:
        return _with_field(_ZOO_STEM[module], field, has_bias=True)
    match = _ZOO_UNIT.match(module)
    if match is None:
        return None
    stage, unit, layer, shortcut = match.groups()
    if shortcut is None:
        step, kind = divmod(int(layer), 3)
        part = f"{('conv', 'bn')[kind]}{step + 1}"
    else:
        part = ("sc", "sc_bn")[int(shortcut)]
    return _with_field(f"stage{int(stage) - 3}_unit{int(unit) + 1}_{part}", field, has_bias=True)


def rename_zoo_exported(name: str, is_bottleneck: bool) -> str | None:
    """Return our name of a tensor in the layout of MXNet's exported resnet50_v1; None for any other name.

    Convolutions are numbered through the units of a stage; the shortcut's follows the others of the first unit.

    >>> rename_zoo_exported("resnetv10_stage1_conv3_weight", is_bottleneck=True)
    'stage1_unit1_sc_weight'
    """
    match = _ZOO_EXPORTED.match(name)
    if match is None:
        return None
    stage, kind, number, field = match.groups()
    part, place, size = {"conv": "conv", "batchnorm": "bn"}[kind], int(number), 3 if is_bottleneck else 2
    if stage is None:
        return _with_field(f"{part}0", field, has_bias=True) if place == 0 else None
    if is_bottleneck or stage != "1":  # the first unit has a shortcut
        if place == size:
            return _with_field(f"stage{stage}_unit1_" + {"conv": "sc", "bn": "sc_bn"}[part], field, has_bias=True)
        place -= place > size
    unit, place = divmod(place, size)
    return _with_field(f"stage{stage}_unit{unit + 1}_{part}{place + 1}", field, has_bias=True)


def norm_after(bias: str) -> str:
    """Return the name (ours) of the BatchNorm that follows the convolution with this bias.

    >>> norm_after("stage1_unit1_conv3_bias")
    'stage1_unit1_bn3'
    """
    layer = bias.removesuffix("_bias")
    return f"{layer}_bn" if layer.endswith("_sc") else layer.replace("conv", "bn")


def _with_field(layer: str, field: str, has_bias: bool = False) -> str | None:
    if "bn" in layer:
        return f"{layer}_{_NORM_FIELD[field]}" if field in _NORM_FIELD else None
    return f"{layer}_{field}" if field == "weight" or (has_bias and field == "bias") else None
