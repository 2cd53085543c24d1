"""Stage 7: the dominant convolutions alone, and with them the least time that this card's cuDNN takes for a step.

N images, C channels, H x W sides of a map, k kernel sides.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from symbol import Symbol
from symbol.shape import propagate
from utils.acceptance.context import Context, seconds_each
from utils.acceptance.networks import NARROW, NASFPN_640, config_of
from utils.acceptance.stage.machine import SIDE, matmul_rate

DOZEN = 12


class Shape(NamedTuple):
    """A convolution of one image."""

    data: tuple[int, ...]  # (C, H, W)
    weight: tuple[int, ...]  # (C of the output, C of a group, k, k)
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilate: tuple[int, ...]
    groups: int
    multiply_add: int

    def __str__(self) -> str:
        sides = "x".join(map(str, self.data[1:]))
        return f"{self.data[0]} to {self.weight[0]}, {'x'.join(map(str, self.weight[2:]))} / {self.stride[0]}, {sides}"


def run(context: Context) -> None:
    config = config_of(NASFPN_640, context.device, "bfloat16", *(NARROW if context.small else ()))
    sides = (config.ResizeParam.short, config.ResizeParam.long)
    shapes = convolutions(config.ModelParam.train_symbol, sides)
    for images in (1,) if context.small else (64, 8):
        context.attempt(f"convolutions of {images} images", partial(_floor, context, shapes, images))


def convolutions(graph: Symbol, sides: tuple[int, int]) -> Counter[Shape]:
    """How often each convolution occurs in a graph."""
    known = propagate(graph.nodes(), {"data": (1, 3, *sides)})
    found: Counter[Shape] = Counter()
    for node in graph.nodes():
        if node.op == "Convolution":
            attrs, weight = node.full_attrs(), known[node.inputs[1]]
            layout = (attrs["stride"] or (1, 1), attrs["pad"] or (0, 0), attrs["dilate"] or (1, 1), attrs["num_group"])
            work = math.prod(known[node, 0]) * math.prod(weight[1:])
            found[Shape(known[node.inputs[0]][1:], weight, *layout, work)] += 1
    return found


def _floor(context: Context, shapes: Counter[Shape], images: int) -> None:
    device = context.device
    dtype = torch.float32 if context.small else torch.bfloat16
    rate = matmul_rate(device, 512 if context.small else SIDE, dtype)
    largest = sorted(shapes, key=lambda shape: shapes[shape] * shape.multiply_add, reverse=True)
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    total = counted = 0.0
    for shape in largest[: 2 if context.small else DOZEN]:
        times = _times(device, dtype, shape, images)
        work, count = 2 * shape.multiply_add * images, shapes[shape]
        total += count * sum(times.values())
        counted += count * shape.multiply_add
        rates = {f"{name} TFLOP/s": work / seconds / 1e12 for name, seconds in times.items()}
        share = 100 * 3 * work / sum(times.values()) / rate
        row: dict[str, Any] = {"images": images, "convolution": str(shape), "times": count, **rates}
        context.record(
            "convolutions", **row, **{"% of a matrix product": share, "ms": 1e3 * count * sum(times.values())}
        )
    torch.backends.cudnn.benchmark = before
    covers = counted / sum(count * shape.multiply_add for shape, count in shapes.items())
    row = {"images": images, "ms of these": 1e3 * total, "% of all multiply-adds": 100 * covers}
    values = {"ms of all at their rate": 1e3 * total / covers, "images/s at most": images * covers / total}
    context.record("floor", **row, **values, **{"matrix product TFLOP/s": rate / 1e12})


def _times(device: torch.device, dtype: torch.dtype, shape: Shape, images: int) -> dict[str, float]:
    """Seconds of the forward pass and of either gradient, channels-last."""

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    data, weight = random(images, *shape.data), random(*shape.weight)
    layout = (shape.stride, shape.pad, shape.dilate)
    out = F.conv2d(data, weight, None, *layout, shape.groups)
    above = torch.randn_like(out)
    repeats = 1 if device.type == "cpu" else 10

    def backward(*wanted: bool) -> object:
        chosen = [*wanted, False]
        return torch.ops.aten.convolution_backward(
            above, data, weight, None, *layout, False, [0, 0], shape.groups, chosen
        )

    return {
        "forward": seconds_each(device, lambda: F.conv2d(data, weight, None, *layout, shape.groups), repeats, 3),
        "input gradient": seconds_each(device, lambda: backward(True, False), repeats, 3),
        "weight gradient": seconds_each(device, lambda: backward(False, True), repeats, 3),
    }
