"""Certify the ONNX export of the published configs at full size and of the demo, and write the table of certificates.

    python3 utils/benchmark_export.py --data-root data --demo experiments/retina_r18v1b_nasfpn_128_2@48_demo

Trained weights of the published configs are not at hand: theirs are random, on images of coco_val2017.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout is used in place

import torch
from torch import Tensor

from config.load import load_config
from config.schema import Config
from core.cli import run
from core.export.certificate import Certificate, Tolerance, certify, detect_all
from core.export.detector_graph import detector_model
from core.export.images import Images, of_image_set
from core.export.runners import onnx_run, openvino_run, torch_run
from core.run.atomic_file import atomic_file
from core.weights.checkpoint import find_weights
from core.weights.first_weights import load_given_weights
from symbol import lower
from symbol.passes import in_precision

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "config" / "demo" / "retina_r18v1b_nasfpn_128_2@48_demo.py"
# smallest input first
PUBLISHED = sorted((ROOT / "config" / "NASFPN").glob("retina_*.py"), key=lambda path: int(path.stem.split("_")[3]))
PAGE = ROOT / "doc" / "benchmarks" / "export.md"
ENGINES = {"onnxruntime": onnx_run, "openvino": openvino_run}
STATISTICS_IMAGES, DEMO_IMAGES = 3, 50
BBOX_SCALE = 0.25  # deltas with a deviation of about 0.2, as those of objects
GAMMA, BETA = (0.5, 1.5), (1.5, 0.5)  # of batch normalization: uniform between, and normal with mean and deviation
HEADER = (
    "config",
    "engine",
    "MB",
    "images",
    "detections",
    "torch",
    "matched",
    "boxes, pixels",
    "scores",
    "AP",
    "torch",
    "ms per image",
    "torch",
    "result",
)
TEXT = """# ONNX export: certificates

Made by `utils/benchmark_export.py`; [export.md](../export.md) explains a certificate. Each file is exported in float32
with decoding and NMS inside, runs one image at a time, and is held against the torch detector in float32: the same
detections are one to one pairs of one class, whose boxes differ by at most {box:g} pixels and whose scores by at most
{score:g}. A column named torch belongs to the column before it.

The demo is trained. The published configs have their full size and random weights, on images of coco_val2017:

- batch normalization: statistics of {statistics} of the images, gamma between {gamma[0]:g} and {gamma[1]:g}, beta
  {beta[0]:g} with a deviation of {beta[1]:g};
- the initial weights of the last box convolution are multiplied by {bbox:g}, for boxes of ordinary sizes.

Beta is not 0, as it is before training: then each normalized layer of a random network enlarges rounding errors about
1.2 times, and in the 640 FPN float32 and float64 differ, in torch itself, by about as much as is allowed here.
Times are of one pass over the images; the load average says what else the machine did.

{machine}

{table}
"""


def random_weights(config: Config, images: Images) -> dict[str, Tensor]:
    """Return random weights of a config's test graph, with moving statistics of the images, moved by
    NormalizeParam.momentum.

    With beta above 0 ReLU is close to linear. With 0, as before training, the ratio of an error to the spread of a
    channel grows from layer to layer (Yang et al. 2019, "A mean field theory of batch normalization").
    """
    graph = in_precision(config.ModelParam.test_symbol, "float32")
    module = lower(graph, seed=0, data=(1, 3, config.ResizeParam.short, config.ResizeParam.long)).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("_gamma"):
                parameter.uniform_(*GAMMA, generator=generator)
            elif name.endswith("_beta"):
                parameter.normal_(*BETA, generator=generator)
        for batch in images.batches[:STATISTICS_IMAGES]:
            prepared = batch.copy()
            for transform in config.test_transform.batch:
                transform.apply(prepared)
            module(data=prepared["data"], im_info=prepared["im_info"])
    weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    weights["bbox_pred_weight"] *= BBOX_SCALE
    return weights


def certificates(config: Config, weights: Mapping[str, Tensor], images: Images) -> dict[str, tuple[Certificate, float]]:
    """Return the certificate and the megabytes of the file, by engine; for each engine that is installed."""
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    content = detector_model(config, arrays, config.DatasetParam.class_names).SerializeToString()
    reference = detect_all(torch_run(config, weights, str(config.General.name)), images.batches, "torch")
    found = {}
    for engine, make in ENGINES.items():
        if importlib.util.find_spec(engine) is None:
            continue
        exported = detect_all(make(config, content), images.batches, engine)
        certificate = certify(exported, reference, images=images.name, score=images.score)
        print(f"{config.General.name}\n{certificate.text()}", flush=True)
        found[engine] = certificate, len(content) / 1e6
    return found


def row(name: str, certificate: Certificate, megabytes: float) -> list[str]:
    """Return the cells of a line of the table."""
    c = certificate
    scores = ["-" if ap is None else f"{ap:.4f}" for ap in (c.ap_exported, c.ap_reference)]
    return [
        name,
        c.subject,
        f"{megabytes:.0f}",
        str(c.num_image),
        str(c.num_exported),
        str(c.num_reference),
        str(c.num_matched),
        f"{c.box_difference:.1g}",
        f"{c.score_difference:.1g}",
        *scores,
        f"{c.ms_exported:.0f}",
        f"{c.ms_reference:.0f}",
        "; ".join(c.problems) or "met",
    ]


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")


def write_page(rows: list[list[str]], path: Path) -> None:
    """Write the page with the table."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    versions = [f"torch {torch.__version__}"]
    for name in ENGINES:
        if importlib.util.find_spec(name) is not None:
            versions.append(f"{name} {importlib.import_module(name).__version__}")
    load = os.getloadavg()[0]
    text = TEXT.format(
        box=Tolerance.box,
        score=Tolerance.score,
        statistics=STATISTICS_IMAGES,
        gamma=GAMMA,
        beta=BETA,
        bbox=BBOX_SCALE,
        machine=f"{processor()}, {torch.get_num_threads()} threads, load average {load:.1f}; {', '.join(versions)}.",
        table="\n".join(f"| {' | '.join(cells)} |" for cells in lines),
    )
    with atomic_file(path) as handle:
        handle.write(text.encode())


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the table of certificates of the ONNX export.")
    parser.add_argument("--data-root", default="data", metavar="DIR", help="the folder of coco")
    parser.add_argument("--demo", metavar="DIR", help="the experiment of the trained demo")
    parser.add_argument("--demo-data", default="data", metavar="DIR", help="the folder of the demo's image set")
    parser.add_argument("--only", default="", metavar="NAME", help="configs with this in their name")
    parser.add_argument(
        "--num-images", type=int, default=8, metavar="N", help=f"per config; the demo has {DEMO_IMAGES}"
    )
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    parsed = parser.parse_args()
    rows: list[list[str]] = []

    def add(name: str, config: Config, weights: Mapping[str, Tensor], images: Images) -> None:
        rows.extend(row(name, *found) for found in certificates(config, weights, images).values())
        write_page(rows, parsed.out)  # the largest take minutes: what is done is kept

    for path in [path for path in PUBLISHED if parsed.only in path.name]:
        settings = ["DatasetParam.image_set='coco_val2017',", "KvstoreParam.gpus=()", "NormalizeParam.momentum=0.5"]
        config = load_config(path, False, [*settings, f"DatasetParam.data_root={parsed.data_root}"])
        images = of_image_set(config, "coco_val2017", False, max(parsed.num_images, STATISTICS_IMAGES))
        weights = random_weights(config, images)
        tested = replace(images, batches=images.batches[: parsed.num_images], score=None)  # random weights have no AP
        add(path.stem.removesuffix("_25epoch"), config, weights, tested)
    if parsed.demo:
        config = load_config(DEMO, False, [f"DatasetParam.data_root={parsed.demo_data}"])
        weights, _ = load_given_weights(find_weights(parsed.demo))
        add("demo", config, weights, of_image_set(config, config.DatasetParam.image_set[0], False, DEMO_IMAGES))
    if not rows:
        raise ValueError(f"no config has {parsed.only!r} in its name, and --demo is not given")
    print(f"wrote {parsed.out}")
    return int(any(cells[-1] != "met" for cells in rows))


if __name__ == "__main__":
    run(main)
