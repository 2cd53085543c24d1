"""Explanation of running out of memory in a training step or a test: what was needed, and the options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from core.engine.device import peak_memory
from core.engine.precision import precision
from core.engine.step_memory import step_memory
from symbol.passes import in_precision

if TYPE_CHECKING:
    from config.schema import Config


@contextmanager
def explain_out_of_memory(config: Config, device: torch.device, at: str, is_test: bool = False) -> Iterator[None]:
    """Turn torch's out-of-memory errors, on GPU or CPU, into a MemoryError that says what to do.

    at: the place, such as "step 7"; is_test: it is a test, not a training step, and has other options.
    """
    try:
        yield
    except RuntimeError as error:
        # the CPU's allocator has no error type of its own, nor have libraries that allocate GPU memory themselves
        known = re.search(r"out of memory|_ALLOC_FAILED|DefaultCPUAllocator", str(error))
        if not isinstance(error, torch.OutOfMemoryError) and known is None:
            raise
        size = re.search(r"allocate ([\d.]+ \w+)", str(error))  # "20.00 MiB" on a GPU, "1234 bytes" on a CPU
        requested = f"it requested {size[1]} more" if size else "it requested more"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        peak = peak_memory(device) / 2**20
        advice = _for_test(config) if is_test else _for_training(config, device)
        raise MemoryError(
            f"out of memory at {at} on {name}: {requested}, the peak so far was {peak:,.0f} MiB. {advice}"
        ) from error


def _for_training(config: Config, device: torch.device) -> str:
    batch, resize = config.General.batch_image, config.ResizeParam
    computed = in_precision(config.ModelParam.train_symbol, precision(config.General, device)[0])
    count = step_memory(computed, config.ModelParam, batch, resize.short, resize.long).total_bytes
    memonger = "ModelParam.memonger is on" if config.ModelParam.memonger else "--set ModelParam.memonger=True"
    return (
        f"A step of {batch} images of {resize.short} x {resize.long} needs at "
        f"least {count / 2**20:,.0f} MiB (--dry-run lists it). Three options: smaller batches for the same "
        f"update ({_smaller_batch(config)}), recomputing instead of storing ({memonger}), a smaller input "
        f"({_smaller_input(config)})"
    )


def _for_test(config: Config) -> str:
    batch, resize = config.TestParam.batch_image, config.ResizeParam
    smaller = f"--set TestParam.batch_image={batch // 2}" if batch > 1 else "a batch is one image already"
    return (
        f"A batch has {batch} images of {resize.short} x {resize.long}. Two options: smaller batches, with the same "
        f"detections ({smaller}), a smaller input ({_smaller_input(config)})"
    )


def _smaller_batch(config: Config) -> str:
    """Return the options for the same update from more and smaller batches."""
    batch, accumulate = config.General.batch_image, config.OptimizeParam.accumulate
    if batch == 1:
        return "a batch is one image already"
    factor = next(factor for factor in range(2, batch + 1) if batch % factor == 0)
    return f"--set General.batch_image={batch // factor} --set OptimizeParam.accumulate={accumulate * factor}"


def _smaller_input(config: Config) -> str:
    short, long = (max(128, side - 128) for side in (config.ResizeParam.short, config.ResizeParam.long))
    if (short, long) == (config.ResizeParam.short, config.ResizeParam.long):
        return "the input is the smallest already"
    return f"--set ResizeParam.short={short} --set ResizeParam.long={long}"
