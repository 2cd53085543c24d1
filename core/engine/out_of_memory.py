"""Out of memory in a training step or a test: what was needed, and the ways out."""

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
def explained_memory(config: Config, device: torch.device, at: str, is_test: bool = False) -> Iterator[None]:
    """Turns torch's error of memory that is not there, on GPU or CPU, into a MemoryError that says what to do.

    at: what was being done, such as "step 7"; is_test: it was no training step, which needs other ways out.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_memory(error):
            raise
        advice = _for_test(config) if is_test else _for_training(config, device)
        raise MemoryError(f"{_happened(device, at, str(error))}. {advice}") from error


def _is_of_memory(error: RuntimeError) -> bool:
    # the CPU's allocator has no error of its own, nor have the libraries that ask the GPU for memory themselves
    told = re.search(r"out of memory|_ALLOC_FAILED|DefaultCPUAllocator", str(error))
    return isinstance(error, torch.OutOfMemoryError) or told is not None


def _happened(device: torch.device, at: str, error: str) -> str:
    wanted = re.search(r"allocate ([\d.]+ \w+)", error)  # "20.00 MiB" of a GPU, "1234 bytes" of a CPU
    asked = f"it asked for {wanted[1]} more" if wanted else "it asked for more"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return (
        f"out of memory at {at} on {where}: {asked}, the most in use so far was {peak_memory(device) / 2**20:,.0f} MiB"
    )


def _for_training(config: Config, device: torch.device) -> str:
    batch, resize = config.General.batch_image, config.ResizeParam
    computed = in_precision(config.ModelParam.train_symbol, precision(config.General, device)[0])
    count = step_memory(computed, config.ModelParam, batch, resize.short, resize.long).total_bytes
    return (
        f"A step of {batch} images of {resize.short} x {resize.long} needs at "
        f"least {count / 2**20:,.0f} MiB (--dry-run lists it). Three ways out: smaller batches for the same "
        f"update ({_smaller_batch(config)}), recomputing instead of storing ({_memonger(config)}), a smaller input "
        f"({_smaller_input(config)})"
    )


def _for_test(config: Config) -> str:
    batch, resize = config.TestParam.batch_image, config.ResizeParam
    smaller = f"--set TestParam.batch_image={batch // 2}" if batch > 1 else "a batch is one image already"
    return (
        f"A batch was {batch} images of {resize.short} x {resize.long}. Two ways out: smaller batches, which find the "
        f"same ({smaller}), a smaller input ({_smaller_input(config)})"
    )


def _smaller_batch(config: Config) -> str:
    """The same update in more and smaller batches."""
    batch, accumulate = config.General.batch_image, config.OptimizeParam.accumulate
    if batch == 1:
        return "a batch is one image already"
    factor = next(factor for factor in range(2, batch + 1) if batch % factor == 0)
    return f"--set General.batch_image={batch // factor} --set OptimizeParam.accumulate={accumulate * factor}"


def _memonger(config: Config) -> str:
    return "ModelParam.memonger is on" if config.ModelParam.memonger else "--set ModelParam.memonger=True"


def _smaller_input(config: Config) -> str:
    short, long = (max(128, side - 128) for side in (config.ResizeParam.short, config.ResizeParam.long))
    if (short, long) == (config.ResizeParam.short, config.ResizeParam.long):
        return "it is the smallest already"
    return f"--set ResizeParam.short={short} --set ResizeParam.long={long}"
