"""Export a trained detector to a file that runs without this program, and certify that it finds the same.

    python3 utils/export.py --config config/demo/retina_r18v1b_nasfpn_128_2@48_demo.py
    python3 utils/export.py --config ... --checkpoint FILE --out detector.onnx --images FOLDER

The certificate is printed, stored in the file and written to `<out>.certificate.txt`. The exit status is 1 if its
tolerances are not met. doc/export.md shows how to run the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout is used in place

from config.load import load_config
from core.cli import run
from core.export.images import of_folder, of_image_set
from core.export.onnx_file import CERTIFICATE_SUFFIX, certify_onnx, export_onnx, require_packages
from core.run.experiment import experiment_folder
from core.weights.checkpoint import find_weights
from core.weights.first_weights import load_given_weights
from core.weights.simpledet_weights import from_simpledet

MOST_IMAGES = 50


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a trained detector, with a certificate.")
    parser.add_argument("--config", required=True, help="the config file that the detector was trained with")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a field")
    parser.add_argument("--data-root", metavar="DIR", help="the folder of the image sets, instead of data")
    parser.add_argument("--checkpoint", metavar="FILE", help="instead of the experiment's newest")
    parser.add_argument("--format", choices=["onnx"], default="onnx")
    parser.add_argument("--out", metavar="FILE", help="instead of <checkpoint>.onnx in the experiment's folder")
    parser.add_argument("--raw", action="store_true", help="stop at the maps of the head, without decoding and NMS")
    parser.add_argument("--portrait", action="store_true", help="an input that is not square: its portrait shape")
    parser.add_argument("--images", metavar="DIR", help="images of the certificate, instead of the test set's")
    parser.add_argument(
        "--num-images", type=int, default=MOST_IMAGES, metavar="N", help=f"at most; {MOST_IMAGES} by default"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; returns the exit status."""
    parsed = parse_arguments(arguments)
    if parsed.num_images < 1:
        raise ValueError(f"--num-images: expected 1 or more, got {parsed.num_images}")
    require_packages("onnx", "onnxruntime")
    roots = [] if parsed.data_root is None else [f"DatasetParam.data_root={parsed.data_root}"]
    config = load_config(parsed.config, is_train=False, overrides=[*parsed.set, *roots])
    checkpoint = Path(parsed.checkpoint) if parsed.checkpoint else find_weights(experiment_folder(config))
    weights, progress = load_given_weights(checkpoint)
    graph = config.ModelParam.test_symbol
    expected = {*graph.list_arguments(), *graph.list_auxiliary_states()}
    weights, lines = from_simpledet(weights, expected, config.NormalizeParam, checkpoint)
    if parsed.images:
        images = of_folder(config, Path(parsed.images), parsed.portrait, parsed.num_images)
    else:
        images = of_image_set(config, config.DatasetParam.image_set[0], parsed.portrait, parsed.num_images)
    out = Path(parsed.out or checkpoint.with_suffix(".onnx"))
    for line in [*config.notes, *lines, f"exporting {checkpoint} (epoch {progress.epoch}, step {progress.step})"]:
        print(line)
    certificate = export_onnx(
        config,
        weights,
        out,
        class_names=progress.class_names,
        raw=parsed.raw,
        portrait=parsed.portrait,
        certificate=partial(certify_onnx, config, weights, checkpoint, images),
    )
    assert certificate is not None
    print(f"wrote {out} and {out}{CERTIFICATE_SUFFIX}:\n{certificate.text()}", end="")
    if certificate.problems:
        print(f"error: {out} is not the same detector: {'; '.join(certificate.problems)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run(main)
