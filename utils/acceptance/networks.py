"""The networks that the stages compute, their batches and their precisions.

N images, H x W input sides, G boxes of an image.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
import torch

from config.load import load_config
from config.schema import Config
from core.engine.device import to_device
from core.engine.trainer import Trainer, build_trainer
from models.record import Batch
from utils.acceptance.context import ROOT
from utils.benchmark_step import random_batch
from utils.make_demo_dataset import draw_scene

DEMO = ROOT / "config" / "demo" / "retina_r18v1b_nasfpn_128_2@48_demo.py"
EXPERIMENTS = ROOT / "config" / "NASFPN"
NASFPN_640 = EXPERIMENTS / "retina_r50v1b_nasfpn_640_7@256_25epoch.py"
# of the published networks, so narrow that a CPU computes them in float64 in a second; P7 is 2 x 2 cells
NARROW = (
    "BackboneParam.depth=18",
    "BackboneParam.num_filter=16",
    "NeckParam.dim_reduced=32",
    "NeckParam.num_stage=2",
    "RpnParam.head.conv_channel=32",
    "RpnParam.num_class=7",
    "General.batch_image=4",
    "ResizeParam.short=256",
    "ResizeParam.long=256",
)
PRECISIONS = {
    "float32": ("General.fp16=False", "General.bf16=False", "General.tf32=False"),
    "TF32": ("General.fp16=False", "General.bf16=False", "General.tf32=True"),
    "float16": ("General.fp16=True", "General.bf16=False"),
    "bfloat16": ("General.fp16=True", "General.bf16=True"),
}


class Published(NamedTuple):
    """The figures of a config's docstring, of one GTX 1080 Ti of eight."""

    images: int
    images_per_second: float  # of all eight
    memory_gb: float


def published(path: Path) -> Published | None:
    """Return the published figures in the docstring of a config file; None if it has none."""
    pattern = r"(\d+) images per GPU: ([\d.]+) img/s, ([\d.]+) GB per GPU \(published\)"
    found = re.search(pattern, path.read_text("utf-8"))
    return found and Published(int(found[1]), float(found[2]), float(found[3]))


def config_of(path: Path, device: torch.device, precision: str, *sets: str) -> Config:
    """The training config of a file on one device, from scratch. PRECISIONS has the names of `precision`."""
    where = "KvstoreParam.gpus=cpu" if device.type == "cpu" else f"KvstoreParam.gpus={device.index}"
    return load_config(path, True, [*PRECISIONS[precision], where, "ModelParam.from_scratch=True", *sets])


def trainer_of(config: Config, device: torch.device) -> Trainer:
    """A trainer with its first weights; torch's switches are as the config has them."""
    trainer, _ = build_trainer(config, device, iter_per_epoch=1000, start=None)
    return trainer


def scene_batch(config: Config, num_image: int | None = None) -> Batch:
    """A batch on the CPU as the loader gives it, of drawn scenes: on noise all images would look alike from afar, and
    batch normalization would enlarge the rounding of what differs."""
    batch = random_batch(config, torch.device("cpu"))
    N, H, W, _ = batch["image"].shape
    scenes = [draw_scene(np.random.default_rng(i), min(H, 256), 4)[0] for i in range(N)]
    batch["image"] = torch.from_numpy(np.stack([cv2.resize(scene, (W, H)) for scene in scenes]))
    if num_image is None:
        return batch
    return cast(Batch, {name: value[:num_image] for name, value in cast(dict[str, Any], batch).items()})


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return a copy of the batch, which a step may change, on the device."""
    return to_device(batch, device)
