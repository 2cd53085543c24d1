"""Export a trained detector to a file that runs without this program, and certify that it finds the same.

    python3 utils/export.py --experiment experiments/birds
    python3 utils/export.py --checkpoint FILE --out detector.onnx --images FOLDER

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
from core.trained import find_trained

MOST_IMAGES = 50


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a trained detector, with a certificate.")
    parser.add_argument("--experiment", metavar="DIR", help="the folder of the experiment")
    parser.add_argument("--config", help="the config file, for checkpoints without a description of their detector")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a field")
    parser.add_argument("--data-root", metavar="DIR", help="the folder of the image sets, instead of data")
    parser.add_argument("--checkpoint", metavar="FILE", help="one checkpoint, instead of the experiment's newest")
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
    if not (parsed.experiment or parsed.checkpoint or parsed.config):
        raise ValueError("expected a trained detector: --experiment DIR, --checkpoint FILE or --config FILE")
    if parsed.num_images < 1:
        raise ValueError(f"--num-images: expected 1 or more, got {parsed.num_images}")
    require_packages("onnx", "onnxruntime")
    roots = [] if parsed.data_root is None else [f"DatasetParam.data_root={parsed.data_root}"]
    overrides = [*parsed.set, *roots]
    given = load_config(parsed.config, is_train=False, overrides=overrides) if parsed.config else None
    trained = find_trained(parsed.checkpoint or parsed.experiment, given, overrides=overrides)
    config, checkpoint = trained.config, trained.path
    weights, progress, lines = trained.weights()
    if parsed.images:
        images = of_folder(config, Path(parsed.images), parsed.portrait, parsed.num_images)
    elif not config.DatasetParam.image_set:
        raise ValueError(f"{checkpoint} names no test set: give a folder of images for the certificate with --images")
    else:
        images = of_image_set(config, config.DatasetParam.image_set[0], parsed.portrait, parsed.num_images)
    out = Path(parsed.out or checkpoint.with_suffix(".onnx"))
    for line in [*trained.notes, *config.notes, *lines]:
        print(line)
    print(f"exporting {checkpoint} (epoch {progress.epoch}, step {progress.step})")
    certificate = export_onnx(
        config,
        weights,
        out,
        class_names=trained.class_names,
        provenance=trained.provenance(),
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
