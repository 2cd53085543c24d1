"""Time the detection in one image of 1280 x 1280 pixels: by Detector, by its ONNX file, and by torchvision's RetinaNet.

    python3 utils/benchmark_detector.py [--image FILE] [--side 1280] [--rounds 7]

From the image as an array of bytes to boxes in its pixels; the sides take turns. The network is ResNet-50 with FPN,
which torchvision has too (`pip install -e ".[peers]"`); weights are random, with the statistics of the image, and
scores are not cut, so that every side has as many candidates as it takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout is used in place

import numpy as np
import torch
from torch import Tensor

from config.load import load_config
from config.schema import Config
from core.cli import run
from core.data.image import read_picture
from core.detector import Detector
from core.engine.precision import cpu_has_bfloat16
from core.export.images import of_folder
from core.export.onnx_file import export_onnx
from core.export.runners import onnx_run
from core.trained import find_trained
from core.weights.checkpoint import Progress, save_checkpoint
from utils.benchmark_export import processor, random_weights
from utils.benchmark_peers import PeerMissingError, import_torchvision

CONFIG = Path(__file__).resolve().parents[1] / "config" / "NASFPN" / "retina_r50v1b_fpn_640_1@256_25epoch.py"
C = 80  # classes
Side = Callable[[], int]  # one image; returns the number of detections


def load(side: int, half: bool) -> Config:
    """Return the config of the network for a square input."""
    settings = [
        f"ResizeParam.short={side}",
        f"ResizeParam.long={side}",
        f"RpnParam.num_class={C + 1}",
        f"General.fp16={half}",
        "RpnParam.proposal.min_det_score=0.0",
        "KvstoreParam.gpus=cpu",
        "NormalizeParam.momentum=0",
        "DatasetParam.data_root=none",  # annotations on this machine do not count
    ]
    return load_config(CONFIG, is_train=False, overrides=settings)


def detector_side(config: Config, weights: Mapping[str, Tensor], folder: Path, image: np.ndarray) -> Side:
    """Return the side of `core.detector.Detector`."""
    progress = Progress(epoch=1, step=1, seed=0, experiment="random")
    path = save_checkpoint(folder, "checkpoint-0001", weights, {}, progress).weights
    detector = Detector(find_trained(path, config), device="cpu", min_score=0)
    return lambda: len(detector(image))


def onnx_side(config: Config, content: bytes, image: np.ndarray) -> Side:
    """Return the side of an exported file in onnxruntime; resizing and padding are included."""
    detect = onnx_run(config, content)
    prepare = config.test_transform.sample[1:]

    def side() -> int:
        record = {"image": image, "h": len(image), "w": image.shape[1], "gt_bbox": np.empty((0, 5), np.float32)}
        for transform in prepare:
            transform.apply(record)
        batch = {name: torch.from_numpy(np.asarray(record[name])[None]) for name in ("image", "im_info")}
        (found,) = detect({**batch, "im_id": torch.zeros(1), "files": [""]})  # type: ignore[typeddict-item]
        return len(found.score)

    return side


def torchvision_side(image: np.ndarray, side: int, half: bool) -> Side:
    """Return the side of torchvision's RetinaNet, with its own resizing; half: under autocast to bfloat16."""
    torchvision = import_torchvision()
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=C, min_size=side, max_size=side, score_thresh=0.0
    )
    model.eval().to(memory_format=torch.channels_last)

    def detect() -> int:
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return len(model([pixels])[0]["scores"])

    return detect


def measure(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each side, by turns; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: Mapping[str, list[float]], counts: Mapping[str, int]) -> list[str]:
    """Return the times as lines of a table; a ratio is that of the medians to the first side's."""
    first = statistics.median(next(iter(seconds.values())))
    lines = ["| | ms, minimum | median | times the first | detections |", "|---|---|---|---|---|"]
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(
            f"| {name} | {1e3 * min(times):.0f} | {1e3 * median:.0f} | {median / first:.2f} | {counts[name]} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the detection in one image.")
    parser.add_argument("--image", metavar="FILE", help="instead of noise")
    parser.add_argument("--side", type=int, default=1280, help="of the image and the input, a multiple of 128")
    parser.add_argument("--rounds", type=int, default=7)
    parsed = parser.parse_args()
    if parsed.rounds < 1:
        raise ValueError(f"--rounds: expected 1 or more, got {parsed.rounds}")
    config = load(parsed.side, half=False)
    shape = (parsed.side, parsed.side, 3)
    image = read_picture(parsed.image) if parsed.image else np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides, sizes = build(config, image, folder, parsed.side)
        counts = {side: detect() for side, detect in sides.items()}
        seconds = measure(sides, parsed.rounds)
    print(
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {parsed.rounds} rounds by turns"
    )
    print(f"one image of {image.shape[0]} x {image.shape[1]}, input {parsed.side} x {parsed.side}; {sizes}")
    print("\n".join(table(seconds, counts)))
    return 0


def build(config: Config, image: np.ndarray, folder: Path, side: int) -> tuple[dict[str, Side], str]:
    """Return the sides that this machine has, and the sizes of the files."""
    from PIL import Image

    pictures = folder / "images"
    pictures.mkdir()
    Image.fromarray(image).save(pictures / "image.png")
    images = of_folder(config, pictures, portrait=False, most=1)
    weights = random_weights(config, images)
    sides = {"Detector, float32": detector_side(config, weights, folder / "float32", image)}
    if cpu_has_bfloat16():
        half = load(side, half=True)
        sides["Detector, bfloat16"] = detector_side(half, weights, folder / "half", image)
    out = folder / "detector.onnx"
    export_onnx(config, weights, out, class_names=[str(number) for number in range(C)])
    sides["ONNX in onnxruntime, float32"] = onnx_side(config, out.read_bytes(), image)
    sizes = f"ONNX file {out.stat().st_size / 1e6:.0f} MB"
    try:
        import_torchvision()
    except PeerMissingError as error:
        print(error)
    else:
        sides["torchvision's RetinaNet, float32"] = torchvision_side(image, side, half=False)
        if cpu_has_bfloat16():
            sides["torchvision's RetinaNet, bfloat16 (autocast)"] = torchvision_side(image, side, half=True)
    return sides, sizes


if __name__ == "__main__":
    run(main)
