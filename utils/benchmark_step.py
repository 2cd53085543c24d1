"""Benchmark a training step of a config, in total and by part, on random images.

    python3 utils/benchmark_step.py --config config/demo/retina_r18v1b_nasfpn_128_2@48_demo.py --steps 10

No files are read or written. Steps are those of a run, back to back without waiting for the device; the parts are timed
separately and each waits for the device, so they may sum to more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from config.load import load_config
from config.schema import Config
from core.cli import run
from core.engine.device import peak_memory, select_device
from core.engine.trainer import Trainer, build_trainer
from models.record import Batch, select


def random_batch(config: Config, device: torch.device) -> Batch:
    """Return a batch as from the loader: full-size images with 8 boxes each."""
    generator = torch.Generator().manual_seed(0)
    batch, pad = config.General.batch_image, config.PadParam
    image = torch.randint(0, 256, (batch, pad.short, pad.long, 3), dtype=torch.uint8, generator=generator)
    gt_bbox = torch.full((batch, pad.max_num_gt, 5), -1.0)
    corner = torch.rand(batch, 8, 2, generator=generator) * pad.short * 0.7
    side = pad.short * (0.05 + 0.25 * torch.rand(batch, 8, 2, generator=generator))
    gt_bbox[:, :8] = torch.cat([corner, corner + side, torch.ones(batch, 8, 1)], dim=2)
    im_info = torch.tensor([[pad.short, pad.long, 1.0]]).repeat(batch, 1)
    return {"image": image.to(device), "gt_bbox": gt_bbox.to(device), "im_info": im_info.to(device), "files": []}


def time_parts(trainer: Trainer) -> dict[str, float]:
    """Return the seconds of each part of one step, each including the device's work."""
    config = trainer.config
    batch = random_batch(config, trainer.device)
    parts, clock = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        wait(trainer.device)
        parts[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    for transform in config.transform.batch:
        transform.apply(batch)
    lap("batch transforms and targets")
    outputs = trainer.module(**select(batch, config.data_name + config.label_name))
    loss = sum(outputs[: len(config.ModelParam.train_symbol)])
    lap("forward and losses")
    trainer.optimizer.zero_grad()
    loss.backward()
    lap("backward")
    trainer.optimizer.step(1e-9)
    lap("update")
    return parts


def time_steps(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Return seconds per step, back to back as in a run, and the part of them in which the host was busy."""
    batches = [random_batch(trainer.config, trainer.device) for _ in range(steps)]
    wait(trainer.device)
    start = time.perf_counter()
    for number, batch in enumerate(batches):
        trainer.step([batch], number)
    host = time.perf_counter()
    wait(trainer.device)
    return (time.perf_counter() - start) / steps, (host - start) / steps


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step of a config, part by part.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after two that are not")
    arguments = parser.parse_args()
    overrides = ["ModelParam.from_scratch=True", *arguments.set]
    config = load_config(arguments.config, is_train=True, overrides=overrides)
    device = select_device(config.KvstoreParam.gpus)
    trainer, notes = build_trainer(config, device, iter_per_epoch=1000, start=None)
    time_steps(trainer, 2)
    step, host = time_steps(trainer, arguments.steps)
    times = [time_parts(trainer) for _ in range(arguments.steps)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{config.General.name} on {name}, torch {torch.__version__}, {config.General.batch_image} images per step")
    print(f"  {'; '.join([*notes, *trainer.describe()])}")
    for part in times[0]:
        print(f"  {part:<30} {1000 * statistics.median(row[part] for row in times):9.1f} ms")
    print(f"  {'step, back to back':<30} {1000 * step:9.1f} ms")
    print(f"  {'of it the host':<30} {1000 * host:9.1f} ms")
    print(f"  {config.General.batch_image / step:.2f} img/s")
    print(f"  {'peak memory':<30} {peak_memory(device) / 2**20:9.0f} MiB")


if __name__ == "__main__":
    run(main)
