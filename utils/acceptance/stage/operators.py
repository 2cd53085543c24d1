"""Stage 8: the operators alone, beside their references and torchvision, and under a memory checker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from operator_cxx import library
from utils.acceptance.context import Context, python
from utils.acceptance.stage.machine import copy_rate
from utils.benchmark_operators import (
    Case,
    best_time,
    box_cases,
    by_reference,
    decode_cases,
    extra_memory,
    focal_cases,
    nms_cases,
    target_cases,
)

SECONDS = 0.15  # of a measurement
GROUPS: tuple[Callable[[torch.device], Iterator[Case]], ...] = (
    focal_cases,
    box_cases,
    decode_cases,
    nms_cases,
    target_cases,
)
NOT_SUPPORTED = "Device not supported"  # compute-sanitizer's words on a virtual device
FOUND = 9  # its exit status where it finds an error


def run(context: Context) -> None:
    context.record("kernels", notes=library.notes)
    if not context.small:
        # first: the timings may take all that is left
        context.attempt("memory check", partial(_memory_check, context))
    rate = copy_rate(context.device, 2**30 // (64 if context.small else 1))
    for group in (nms_cases,) if context.small else GROUPS:
        context.attempt(group.__name__, partial(_group, context, group, rate))
    if context.small:
        context.skip("memory check", "compute-sanitizer checks GPUs; `make sanitize` is for the CPU's kernels")


def _group(context: Context, group: Callable[[torch.device], Iterator[Case]], rate: float) -> None:
    for case in group(context.device):
        ours = best_time(case.work, context.device, SECONDS)
        extra = extra_memory(case.work, context.device) / 2**20
        row: dict[str, Any] = {"operator": case.name, "ms": 1e3 * ours}
        row |= {"% of a copy": 100 * case.bytes / ours / rate, "extra MiB": extra}
        row["reference ms"] = 1e3 * best_time(by_reference(case.work), context.device, SECONDS)
        row["others ms"] = [f"{name} {1e3 * best_time(work, context.device, SECONDS):.3g}" for name, work in case.peers]
        context.record("operators", **row)


def _memory_check(context: Context) -> None:
    """Run every operator on small tensors under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        context.skip("memory check", "there is no compute-sanitizer")
        return
    checked = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), "--leak-check", "no"]
    command = [*checked, *python("-m", "utils.acceptance.stage.small_operators")]
    # every tensor in memory of its own, so that reading beyond it is seen
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "NECKLACE_OPS": "compiled"}
    status, printed = context.run(command, variables, share=0.6)
    if NOT_SUPPORTED in printed:
        context.skip("memory check", f"compute-sanitizer says: {NOT_SUPPORTED}")
    elif status is None:
        context.record("memory check", outcome="it did not end in time", says=printed.strip()[-200:])
    else:
        context.check("memory check finds nothing", status == 0, says=printed.strip()[-600:])
