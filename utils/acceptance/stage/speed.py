"""Stage 4: images a second and memory of a training step of the published networks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.engine.device import peak_memory
from core.engine.out_of_memory import explain_out_of_memory
from core.engine.step_memory import GIB, step_memory
from core.engine.trainer import Trainer
from symbol.passes import in_precision
from utils.acceptance.context import Context, seconds_each, wait
from utils.acceptance.networks import EXPERIMENTS, NARROW, NASFPN_640, config_of, published, trainer_of
from utils.benchmark_step import random_batch

SIZES = {"bfloat16": (8, 64, 32, 16, 96), "float16": (8, 64)}  # images of NAS-FPN 640
WORTH = 1.03  # a larger batch is tried while it is so much faster
MEASURED = 1.5  # seconds of steps back to back


def run(context: Context) -> None:
    sizes: dict[str, tuple[int, ...]] = {"float32": (1, 2)} if context.small else SIZES
    for precision, images in sizes.items():
        context.attempt(f"NAS-FPN 640 in {precision}", partial(_sizes, context, precision, images))
    others = [path for path in sorted(EXPERIMENTS.glob("retina_*.py")) if path != NASFPN_640]
    for position, path in enumerate(others[:1] if context.small else others):
        until = time.monotonic() + context.time_left / (len(others) - position)
        context.attempt(path.stem, partial(_published_and_fastest, context, path, until))


def _sizes(context: Context, precision: str, images: tuple[int, ...]) -> None:
    trainer = build(context, NASFPN_640, precision)
    for number in images:
        measure(context, NASFPN_640, trainer, number)


def _published_and_fastest(context: Context, path: Path, until: float) -> None:
    trainer = build(context, path, "float32" if context.small else "bfloat16")
    known = published(path)
    images, before = known.images if known else trainer.config.General.batch_image, 0.0
    if context.small:
        images = 1
    while True:
        began = time.monotonic()
        row = measure(context, path, trainer, images)
        rate = row.get("images/s", 0.0)
        took = time.monotonic() - began
        if context.small or rate < WORTH * before or not _fits(2 * row["counted GiB"]):
            break
        if time.monotonic() + 2 * took > until:
            context.record("not tried for want of time", config=path.stem, images=2 * images)
            break
        images, before = 2 * images, rate


def _fits(counted: float) -> bool:
    """Return True if a step of so many GiB by the count may fit, with a tenth for what is not counted."""
    return 1.1 * counted * GIB < torch.cuda.get_device_properties(0).total_memory


def build(context: Context, path: Path, precision: str, *sets: str) -> Trainer:
    """A trainer of a published config; on a CPU of its narrow network."""
    release()
    config = config_of(path, context.device, precision, *(NARROW if context.small else ()), *sets)
    return trainer_of(config, context.device)


def release() -> None:
    """Free the memory of trainers and batches that are no longer used."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def stepper(trainer: Trainer, images: int) -> Callable[[], object]:
    """Return a function that does a step on one batch of so many random images, which are on the device already."""
    trainer.config.General.batch_image = images
    batch = random_batch(trainer.config, trainer.device)
    # a step puts other tensors into the dict, and leaves these as they are
    return lambda: trainer.step([batch.copy()], 0)


def measure(context: Context, path: Path, trainer: Trainer, images: int) -> dict[str, Any]:
    """Record the rate, the host's time and the memory of a step; a batch that does not fit is a row too."""
    device, config = trainer.device, trainer.config
    short, long = config.ResizeParam.short, config.ResizeParam.long
    graph = in_precision(config.ModelParam.train_symbol, trainer.compute_dtype)
    counted = step_memory(graph, config.ModelParam, images, short, long).total_bytes / GIB
    row: dict[str, Any] = {"config": path.stem, "type": trainer.compute_dtype, "images": images}
    try:
        with explain_out_of_memory(config, device, "a step"):
            row |= _timed(device, stepper(trainer, images), images, context.small)
    except MemoryError:
        row["memory"] = "does not fit"
        trainer.optimizer.zero_grad()
    release()
    known = published(path)
    row["counted GiB"] = counted
    if known and not context.small:
        row |= {"published images/s of a GPU": known.images_per_second / 8, "published GB": known.memory_gb}
        row["published images"] = known.images
    context.record("training steps", **row)
    return row


def _timed(device: torch.device, step: Callable[[], object], images: int, small: bool) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(1 if small else 3):
        step()
    host, whole = [], []
    for _ in range(1 if small else 5):
        wait(device)
        began = time.perf_counter()
        step()
        host.append(time.perf_counter() - began)
        wait(device)
        whole.append(time.perf_counter() - began)
    repeats = 1 if small else max(5, min(50, round(MEASURED / statistics.median(whole))))
    each = seconds_each(device, step, repeats, warmup=0)
    row = {"images/s": images / each, "step ms": 1e3 * each, "host ms": 1e3 * statistics.median(host)}
    row["peak GiB"] = peak_memory(device) / GIB
    if device.type == "cuda":
        row["reserved GiB"] = torch.cuda.max_memory_reserved(device) / GIB
    return row
