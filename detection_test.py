"""Test a trained detector: a COCO result file, its AP where there are annotations, and pictures; or run it on images.

python3 detection_test.py --experiment experiments/birds
python3 detection_test.py --experiment experiments/birds --images new/ --out found
python3 detection_test.py --config config/NASFPN/retina_r50v1b_nasfpn_640_7@256_25epoch.py --draw 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from config.load import load_config
from core.cli import add_config_arguments, overrides, run


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test a trained detector, or run it on images.")
    add_config_arguments(parser, config_is_required=False)
    parser.add_argument("--experiment", metavar="DIR", help="the folder of the experiment; needs no --config")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--epoch", type=int, metavar="N", help="the checkpoint after N epochs, instead of the newest")
    which.add_argument(
        "--checkpoint", metavar="FILE", help="a .safetensors file, or MXNet's .params, instead of the experiment's"
    )
    parser.add_argument("--allow-mismatch", action="store_true", help="test although settings make the weights useless")
    parser.add_argument("--flip", action="store_true", help="detect in the mirrored images too, and merge")
    parser.add_argument("--draw", type=int, metavar="N", help="draw the first N images; default 0, with --images all")
    parser.add_argument("--min-score", type=float, metavar="S", help="draw detections from this score on; default 0.3")
    parser.add_argument("--report", action="store_true", help="write an HTML page on what the detector gets wrong")
    images = parser.add_argument_group("images without annotations")
    images.add_argument("--images", nargs="+", metavar="PATH", help="image files, folders, patterns or videos")
    images.add_argument("--out", metavar="DIR", help="where to write; default EXPERIMENT/detected")
    images.add_argument("--tile", type=int, metavar="SIDE", help="detect in tiles of this side too, in image pixels")
    images.add_argument("--overlap", type=int, default=64, metavar="N", help="overlap of the tiles; default 64 pixels")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Test, or detect in images; returns the exit status."""
    parsed = parse_arguments(arguments)
    _check(parsed)
    config = None
    if parsed.config is not None:
        config = load_config(parsed.config, is_train=False, overrides=overrides(parsed))
    from core.distributed.launch import launch
    from core.distributed.process_group import join, launched_size
    from core.engines import choose_engine
    from core.inference import DRAW_SCORE, test
    from core.trained import find_trained

    engine = choose_engine(parsed.engine)
    if config is not None:
        engine.select_device(config, is_train=False)  # what the engine refuses, before weights are looked for
    trained = find_trained(
        parsed.checkpoint or parsed.experiment,
        config,
        overrides=overrides(parsed),
        epoch=parsed.epoch if parsed.epoch is not None or config is None else config.TestParam.model.epoch,
        allow_mismatch=parsed.allow_mismatch,
    )
    draw_score = DRAW_SCORE if parsed.min_score is None else parsed.min_score
    if parsed.images:
        from core.detect_files import detect_files

        device = engine.select_device(trained.config, is_train=False)
        return detect_files(
            trained,
            parsed.images,
            Path(parsed.out) if parsed.out else trained.folder / "detected",
            device,
            min_score=draw_score,
            num_draw=parsed.draw,
            tile=parsed.tile,
            overlap=parsed.overlap,
            flip=parsed.flip,
        )
    num_process = engine.num_process(trained.config, is_train=False)
    if launched_size() is None and num_process > 1:
        return launch(__file__, list(sys.argv[1:] if arguments is None else arguments), num_process)
    device = engine.select_device(trained.config, is_train=False)
    with join(device) as group:
        test(
            trained,
            parsed.draw or 0,
            group,
            device,
            parsed.engine,
            draw_score=draw_score,
            flip=parsed.flip,
            report=parsed.report,
            allow_mismatch=parsed.allow_mismatch,
        )
    return 0


def _check(parsed: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if not (parsed.config or parsed.experiment or parsed.checkpoint):
        raise ValueError("expected a trained detector: --experiment DIR, --checkpoint FILE or --config FILE")
    if parsed.draw is not None and parsed.draw < 0:
        raise ValueError(f"--draw: expected 0 or more images, got {parsed.draw}")
    if parsed.min_score is not None and not 0 <= parsed.min_score <= 1:
        raise ValueError(f"--min-score: expected a score from 0 to 1, got {parsed.min_score}")
    if not parsed.images and (parsed.out or parsed.tile):
        raise ValueError("--out and --tile apply to --images PATH; a test writes into the experiment's folder")
    if parsed.images and parsed.report:
        raise ValueError("--report needs annotations, which --images have none of: test on an image set")
    if parsed.images and parsed.engine != "torch":
        raise ValueError(f"--images: expected the engine torch, got {parsed.engine}")
    if parsed.tile is not None and not 0 <= parsed.overlap < parsed.tile:
        raise ValueError(f"--overlap: expected 0 to less than the tile's {parsed.tile} pixels, got {parsed.overlap}")


if __name__ == "__main__":
    run(main)
