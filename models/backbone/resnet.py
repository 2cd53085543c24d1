"""ResNets as symbols: He et al. 2016, "Deep Residual Learning for Image Recognition".

The stride of a bottleneck is in its first convolution, 1x1 (v1, as published), or in its second, 3x3 (v1b). Both
variants have the same parameter names and shapes, but compute different functions. Basic blocks have no variants.

The names are SimpleDet's: conv0, bn0, stage1_unit1_conv1, ..., stage1_unit1_sc. N images, C channels, H, W.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from symbol import Symbol, var
from symbol.layers import Normalizer, cast, conv, max_pool, relu

Variant = Literal["v1", "v1b"]
PRETRAIN_PREFIX: dict[Variant, str] = {  # default of ModelParam.pretrain.prefix
    "v1": "pretrain_model/resnet-v1-{depth}",
    "v1b": "pretrain_model/resnet{depth}_v1b",
}
Unit = Callable[[Symbol, str, int, int, bool, Normalizer], Symbol]
UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BASIC_BLOCK = (18, 34)  # depths with units of two 3x3 convolutions; deeper networks use bottlenecks


def _shortcut(data: Symbol, name: str, filter: int, stride: int, project: bool, norm: Normalizer) -> Symbol:
    if not project:
        return data
    return norm(conv(data, f"{name}_sc", filter, stride=stride), name=f"{name}_sc_bn")


def _basic_unit(data: Symbol, name: str, filter: int, stride: int, project: bool, norm: Normalizer) -> Symbol:
    x = norm(conv(data, f"{name}_conv1", filter, kernel=3, stride=stride), name=f"{name}_bn1")
    x = relu(x, f"{name}_relu1")
    x = norm(conv(x, f"{name}_conv2", filter, kernel=3), name=f"{name}_bn2")
    return x + _shortcut(data, name, filter, stride, project, norm)


def _bottleneck_unit(
    data: Symbol, name: str, filter: int, stride: int, project: bool, norm: Normalizer, variant: Variant
) -> Symbol:
    first, second = (stride, 1) if variant == "v1" else (1, stride)
    x = norm(conv(data, f"{name}_conv1", filter // 4, stride=first), name=f"{name}_bn1")
    x = relu(x, f"{name}_relu1")
    x = norm(conv(x, f"{name}_conv2", filter // 4, kernel=3, stride=second), name=f"{name}_bn2")
    x = relu(x, f"{name}_relu2")
    x = norm(conv(x, f"{name}_conv3", filter), name=f"{name}_bn3")
    return x + _shortcut(data, name, filter, stride, project, norm)


def resnet_v1b(depth: int, normalizer: Normalizer, fp16: bool, num_filter: int = 64) -> tuple[Symbol, ...]:
    """Return (C2, C3, C4, C5), strides 4 to 32, of the input `data` (N, 3, H, W); with fp16, in float16.

    Raises ValueError for a depth other than 18, 34, 50, 101, 152.
    """
    if depth not in UNITS:
        raise ValueError(f"BackboneParam.depth: expected one of {', '.join(map(str, UNITS))}, got {depth}")
    unit = _basic_unit if depth in BASIC_BLOCK else partial(_bottleneck_unit, variant="v1b")
    return _resnet(depth, unit, normalizer, fp16, num_filter)


def resnet_v1(depth: int, normalizer: Normalizer, fp16: bool, num_filter: int = 64) -> tuple[Symbol, ...]:
    """Return the features of ResNet v1, as `resnet_v1b` does.

    Raises ValueError for a depth other than 50, 101, 152.
    """
    known = [one for one in UNITS if one not in BASIC_BLOCK]
    if depth not in known:
        hint = "; basic blocks have no variants: use the v1b backbone" if depth in BASIC_BLOCK else ""
        raise ValueError(
            f"BackboneParam.depth: expected one of {', '.join(map(str, known))} for ResNet v1, got {depth}{hint}"
        )
    return _resnet(depth, partial(_bottleneck_unit, variant="v1"), normalizer, fp16, num_filter)


def _resnet(depth: int, unit: Unit, normalizer: Normalizer, fp16: bool, num_filter: int) -> tuple[Symbol, ...]:
    data = var("data", shape=(0, 3, 0, 0))
    if fp16:
        data = cast(data, "float16", "data_fp16")
    x = relu(normalizer(conv(data, "conv0", num_filter, kernel=7, stride=2), name="bn0"), "relu0")
    x = max_pool(x, "pool0", kernel=3, stride=2, pad=1)
    features = []
    channels = num_filter
    for stage, num_unit in enumerate(UNITS[depth], start=1):
        filter = num_filter * 2 ** (stage - 1) * (1 if depth in BASIC_BLOCK else 4)
        for index in range(1, num_unit + 1):
            stride = 2 if stage > 1 and index == 1 else 1
            name = f"stage{stage}_unit{index}"
            x = unit(x, name, filter, stride, channels != filter or stride > 1, normalizer)
            x = relu(x, f"{name}_relu")
            channels = filter
        features.append(x)
    return tuple(features)


def variant_of(backbone: type) -> Variant:
    """Return the variant that a backbone class builds; v1b for user classes without the attribute."""
    variant: Variant = getattr(backbone, "variant", "v1b")
    return variant


def default_prefix(depth: int, variant: Variant) -> str:
    """Return the default of ModelParam.pretrain.prefix."""
    return PRETRAIN_PREFIX[variant].format(depth=depth)
