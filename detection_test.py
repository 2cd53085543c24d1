"""Test a trained detector: a COCO result file, its AP where there are annotations, and pictures.

python3 detection_test.py --config config/NASFPN/retina_r50v1b_nasfpn_640_7@256_25epoch.py
python3 detection_test.py --config ... --checkpoint FILE --draw 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from config.load import load_config
from core.cli import add_config_arguments, overrides, run


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test a detector that detection_train.py trained.")
    add_config_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--epoch", type=int, metavar="N", help="the checkpoint after N epochs, instead of the newest")
    which.add_argument(
        "--checkpoint", metavar="FILE", help="a .safetensors file, or MXNet's .params, instead of the experiment's"
    )
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="draw the first N images with detections")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Test; returns the exit status."""
    parsed = parse_arguments(arguments)
    if parsed.draw < 0:
        raise ValueError(f"--draw: expected 0 or more images, got {parsed.draw}")
    config = load_config(parsed.config, is_train=False, overrides=overrides(parsed))
    from core.distributed.launch import launch
    from core.distributed.process_group import join, launched_size
    from core.engines import choose_engine
    from core.inference import test

    engine = choose_engine(parsed.engine)
    num_process = engine.num_process(config, is_train=False)
    if launched_size() is None and num_process > 1:
        return launch(__file__, list(sys.argv[1:] if arguments is None else arguments), num_process)
    epoch = parsed.epoch if parsed.epoch is not None else config.TestParam.model.epoch
    checkpoint = Path(parsed.checkpoint) if parsed.checkpoint else None
    device = engine.select_device(config, is_train=False)
    with join(device) as group:
        test(config, checkpoint, epoch, parsed.draw, group, device, parsed.engine)
    return 0


if __name__ == "__main__":
    run(main)
