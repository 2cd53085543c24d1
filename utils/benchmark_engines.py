"""Images per second of a training step by torch and by MXNet, alternating in one run, on random images.

    make mxnet && .venv-mxnet/bin/python utils/benchmark_engines.py

Config, network, images and step are the same for both; `core.engine_mxnet.trainer` documents MXNet's part.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from config.load import load_config
from core.cli import run
from core.engine import trainer
from core.engine_mxnet import trainer as mxnet_engine
from operator_cxx.mxnet_ops import load_mxnet
from utils.benchmark_step import random_batch

DEMO = Path(__file__).parents[1] / "config" / "demo" / "retina_r18v1b_nasfpn_128_2@48_demo.py"
WARM_UP = 2  # steps that are not timed


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step on both engines.")
    parser.add_argument("--config", default=str(DEMO))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--steps", type=int, default=20, help=f"timed steps, after {WARM_UP} that are not")
    arguments = parser.parse_args()
    overrides = ["ModelParam.from_scratch=True", "KvstoreParam.gpus=()", "RpnParam.num_class=7", *arguments.set]
    device = torch.device("cpu")
    engines: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    for name in ("torch", "MXNet"):
        config = load_config(arguments.config, is_train=True, overrides=overrides)  # each engine has metrics of its own
        engines[name] = (
            mxnet_engine.build_trainer(config, 1000, None)[0]
            if name == "MXNet"
            else trainer.build_trainer(config, device, 1000, None)[0]
        )
        seconds[name] = []
    for step in range(WARM_UP + arguments.steps):
        for name, engine in engines.items():
            batch = random_batch(engine.config, device)
            start = time.perf_counter()
            record = engine.step([batch], step)
            load_mxnet().nd.waitall()  # for the update
            seconds[name].append(time.perf_counter() - start)
            assert (record.values > 0).all(), f"{name} has computed nothing: {record.values}"
    threads = torch.get_num_threads()
    print(f"{config.General.name}, {config.General.batch_image} images per step, {threads} threads of torch")
    for name, each in seconds.items():
        median = statistics.median(each[WARM_UP:])
        print(f"  {name:6} {1000 * median:8.1f} ms per step, {config.General.batch_image / median:6.2f} img/s")


if __name__ == "__main__":
    run(main)
