"""Stage 5: the kernels of a training step, and how long the GPU has none."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from operator_cxx.build import HERE
from utils.acceptance.context import Context, seconds_each, wait
from utils.acceptance.networks import NASFPN_640
from utils.acceptance.stage.speed import build, release, stepper

STEPS = 3
OTHER = "other"
# by parts of a kernel's name, the first that fits
_CLASSES = (
    ("convolution, weight gradient", "wgrad|bwd_?filter|backward_?filter"),
    ("convolution, input gradient", "dgrad|bwd_?data|backward_?data|convolution_backward"),
    ("layout", "nchwtonhwc|nhwctonchw|transpose|permute|converttensor|tensortransform"),
    ("batch normalization", "batch_?norm|bn_?fw|bn_?bw|welford"),
    ("pooling and upsampling", "pool|upsample"),
    ("update and norms", "multi_tensor_apply|_foreach"),
    ("copies", "memcpy|memset|direct_copy|catarraybatchedcopy|fillfunctor|copy_"),
    ("convolution, forward", "fprop|implicit_gemm|convol|conv2d|winograd"),
    ("matrix product", "gemm|nvjet|cutlass|splitk"),
    ("reductions", "reduce_kernel"),
    ("elementwise", "elementwise"),
)

_WAITS = re.compile("(Context|Stream|Event) Sync|Stream Wait")  # a profiler may list them beside kernels


def run(context: Context) -> None:
    for images in (1,) if context.small else (8, 64):
        context.attempt(f"profile of {images} images", partial(_profile, context, images))


def _profile(context: Context, images: int) -> None:
    trainer = build(context, NASFPN_640, "float32" if context.small else "bfloat16")
    step = stepper(trainer, images)
    each = seconds_each(context.device, step, 1 if context.small else 10, warmup=1 if context.small else 3)
    activity = ProfilerActivity.CPU if context.small else ProfilerActivity.CUDA
    steps = 1 if context.small else STEPS
    with profile(activities=[activity]) as profiled:
        for _ in range(steps):
            step()
        wait(context.device)
    kernels = kernels_of(profiled.events(), context.device)
    busy = covered([(start, end) for _, start, end in kernels]) / steps / 1e6
    row: dict[str, Any] = {"images": images, "launches": len(kernels) / steps, "step ms": 1e3 * each}
    if context.small:
        context.skip("idle share of the GPU", "there is none")
    else:
        # the profiler slows the host: the step is timed without it
        row |= {"busy ms": 1e3 * busy, "idle %": 100 * max(0.0, 1 - busy / each)}
    context.record("kernels of a step", **row)
    times: defaultdict[str, float] = defaultdict(float)
    others: defaultdict[str, float] = defaultdict(float)
    counts = Counter(class_of(name) for name, _, _ in kernels)
    for name, start, end in kernels:
        kind = class_of(name)
        times[kind] += (end - start) / 1e3 / steps
        if kind == OTHER:
            others[name] += (end - start) / 1e3 / steps
    total = sum(times.values())
    for kind, milliseconds in _largest(times):
        share = 100 * milliseconds / total
        values = {"images": images, "class": kind, "ms": milliseconds, "%": share, "launches": counts[kind] / steps}
        context.record("time by class", **values)
    for name, milliseconds in _largest(others)[:12]:
        context.record("kernels of no class", images=images, name=name[:120], ms=milliseconds)
    del trainer, step
    release()


def _largest(times: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def kernels_of(events: Iterable[Any], device: torch.device) -> list[tuple[str, float, float]]:
    """Name, start and end in microseconds of what ran on the device; on a CPU of its operators, without what
    they call."""
    if device.type == "cuda":
        chosen = [event for event in events if event.device_type == DeviceType.CUDA and not _WAITS.match(event.name)]
        return [(event.name, event.time_range.start, event.time_range.end) for event in chosen]
    starts = [(event.name, event.time_range.start, event.self_cpu_time_total) for event in events]
    return [(name, start, start + took) for name, start, took in starts]


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How much of the time axis the spans cover: kernels of several streams may overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def class_of(name: str) -> str:
    """The class of a kernel by its name."""
    if _OWN.search(name):
        return "Necklace's operators"
    return next((kind for kind, part in _CLASSES if re.search(part, name, re.IGNORECASE)), OTHER)


def _own_kernels() -> re.Pattern[str]:
    """Names of the kernels in operator_cxx."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(HERE.rglob("*.cu*"))]
    names = {name for source in sources for name in re.findall(r"__global__[^({;]*?(\w+)\s*\(", source)}
    assert names, f"no kernels under {HERE}"
    return re.compile(rf"\b({'|'.join(sorted(names))})\b|necklace::")


_OWN = _own_kernels()
