"""Description of a run for --dry-run, without its data: the network by stage, the schedule, the memory of a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from config.image_set import PUBLISHED, ImageSet, resolve
from core.data.coco_index import open_index
from core.data.dataset import DetectionDataset
from core.engine.precision import precision, requested_precision
from core.engine.schedule import build_schedule
from core.engine.step_memory import step_memory
from core.report.network_table import network_table
from symbol.passes import in_precision

if TYPE_CHECKING:
    from config.schema import Config


def describe_run(config: Config) -> str:
    """Return the description as text. Image counts are those of the data on disk, or else COCO's published ones."""
    short, long = config.ResizeParam.short, config.ResizeParam.long
    train = network_table(config.ModelParam.train_symbol, data=(1, 3, short, long))
    devices = config.KvstoreParam.num_device
    batch_image = config.General.batch_image
    lines = [f"Network, one image of {short} x {long}", *_indented(train.lines()), ""]
    compute_dtype = requested_precision(config.General)  # of GPUs, which this machine need not have
    if not config.KvstoreParam.gpus:
        compute_dtype, _ = precision(config.General, torch.device("cpu"))
    computed = in_precision(config.ModelParam.train_symbol, compute_dtype)
    memory = step_memory(computed, config.ModelParam, batch_image, short, long)
    lines += [
        f"Memory per step on each device ({batch_image} images, activations in {compute_dtype})",
        *_indented(memory.lines()),
        "",
    ]
    accumulate, images = config.OptimizeParam.accumulate, config.OptimizeParam.global_batch_size
    times = f", {accumulate} times" if accumulate > 1 else ""
    step = f"{batch_image} images on each of {devices} device{'s' if devices > 1 else ''}{times}: {images} per step"
    lines += [f"Schedule, {step}", *_indented(_schedule_lines(config, images))]
    return "\n".join(lines)


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _schedule_lines(config: Config, images_per_step: int) -> list[str]:
    counts = [_count_images(config, one) for one in config.DatasetParam.image_set]
    unknown = [f"{name}: iterations unknown ({why})" for name, count, why in counts if count is None]
    if unknown:
        schedule, lr = config.OptimizeParam.schedule, config.OptimizeParam.optimizer.lr
        return [
            *unknown,
            f"{schedule.end_epoch} epochs, lr {lr}, times {schedule.lr_factor} after the epochs {schedule.lr_epoch}",
        ]
    lines = [f"{name}: {count} images with boxes ({source})" for name, count, source in counts]
    samples = sum(count or 0 for _, count, _ in counts) * (2 if config.DatasetParam.flip else 1)
    iter_per_epoch = -(-samples // images_per_step)
    twice = " (each image twice, once flipped)" if config.DatasetParam.flip else ""
    lines.append(f"an epoch: {samples} samples{twice}, {iter_per_epoch} iterations")
    return lines + build_schedule(config, iter_per_epoch).describe()


def _count_images(config: Config, image_set: str | ImageSet) -> tuple[str, int | None, str]:
    """Return the name of an image set, its number of images with boxes (None: unknown), and the source or reason."""
    resolved = resolve(image_set, config.DatasetParam.data_root)
    if Path(resolved.annotation).is_file():
        try:
            return resolved.name, DetectionDataset([open_index(resolved)], []).num_image, resolved.annotation
        except (ValueError, OSError) as error:
            return resolved.name, None, str(error)
    published = PUBLISHED.get(image_set) if isinstance(image_set, str) else None
    if published is None:
        return resolved.name, None, f"no {resolved.annotation}"
    return resolved.name, published.num_image, "published"
