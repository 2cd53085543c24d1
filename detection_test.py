"""Test a trained detector: a COCO result file, its AP where there are annotations, and pictures.

python3 detection_test.py --config config/NASFPN/retina_r50v1b_nasfpn_640_7@256_25epoch.py
python3 detection_test.py --config ... --checkpoint FILE --draw 20
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from config.load import load_config
from detection_train import add_config_arguments, overrides, run


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test a detector that detection_train.py trained.")
    add_config_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--epoch", type=int, metavar="N", help="the checkpoint after N epochs, instead of the newest")
    which.add_argument(
        "--checkpoint", metavar="FILE", help="a .safetensors file, or MXNet's .params, instead of the experiment's"
    )
    parser.add_argument("--engine", choices=["torch", "mxnet"], default="torch", help="what computes; see README")
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="draw the first N images with detections")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    if parsed.draw < 0:
        raise ValueError(f"--draw: expected 0 or more images, got {parsed.draw}")
    config = load_config(parsed.config, is_train=False, overrides=overrides(parsed))
    from core.distributed.launch import launch
    from core.distributed.process_group import join, launched_size
    from core.engine.device import select_device, usable
    from core.inference import test

    epoch = parsed.epoch if parsed.epoch is not None else config.TestParam.model.epoch
    checkpoint = Path(parsed.checkpoint) if parsed.checkpoint else None
    if parsed.engine == "mxnet":
        if launched_size() not in (None, 1):
            raise ValueError(
                "the engine mxnet tests in one process, on one device: start detection_test.py without a launcher, or "
                "use the engine torch"
            )
        test(config, checkpoint=checkpoint, epoch=epoch, num_draw=parsed.draw, engine=parsed.engine)
        return
    kvstore = config.KvstoreParam
    gpus = usable(kvstore.gpus)  # a machine with fewer GPUs than the config names may test too
    num_process = len(gpus) if kvstore.gpus else kvstore.processes
    if launched_size() is None and num_process > 1:
        sys.exit(launch(__file__, list(sys.argv[1:] if arguments is None else arguments), num_process))
    device = select_device(gpus or kvstore.gpus, int(os.environ.get("LOCAL_RANK", "0")))
    with join(device) as world:
        test(config, checkpoint=checkpoint, epoch=epoch, num_draw=parsed.draw, world=world, device=device)


if __name__ == "__main__":
    run(main)
