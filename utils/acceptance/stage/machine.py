"""Stage 0: the rates that the machine reaches at all, in matrix products and in copies."""

from __future__ import annotations

from typing import Any

import torch

from utils.acceptance.context import Context, seconds_each, set_tf32
from utils.acceptance.environment import environment

SIDE = 8192
COPY_BYTES = 2**30


def run(context: Context) -> None:
    context.record("environment", **environment(context.device.type))
    context.record("settings of torch", **_settings())
    side = 512 if context.small else SIDE
    kinds: list[tuple[str, torch.dtype, bool]] = [
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("TF32", torch.float32, True),
        ("float32", torch.float32, False),
    ]
    for name, dtype, tf32 in kinds:
        if context.small and name != "float32":
            context.skip(f"matrix product in {name}", "a CPU's rate in it says nothing of a GPU")
            continue
        set_tf32(tf32)
        rate = matmul_rate(context.device, side, dtype)
        context.record("matrix product", type=name, side=side, **{"TFLOP/s": rate / 1e12})
    size = COPY_BYTES // (64 if context.small else 1)
    context.record("copy", MiB=size / 2**20, **{"GB/s, reads and writes": copy_rate(context.device, size) / 1e9})


def matmul_rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product of random numbers."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    repeats = 10 if device.type == "cuda" else 2
    return 2 * side**3 / seconds_each(device, lambda: torch.mm(left, right, out=out), repeats)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes read and written a second by a large copy on the device."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_each(device, lambda: target.copy_(source), 10)


def _settings() -> dict[str, Any]:
    return {
        "float32 convolutions": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "float32 matrix products": torch.backends.cuda.matmul.fp32_precision,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "threads": torch.get_num_threads(),
    }
