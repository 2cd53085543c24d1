"""Benchmark of scaling: images per second of two CPU processes that train together, on one core each, beside one
process alone, and beside two independent ones, whose loss is due to the machine and not to the training.

    python3 utils/benchmark_scaling.py
    python3 utils/benchmark_scaling.py --set NeckParam.num_stage=5 --set General.batch_image=2 --steps 6

The networks are the demo's and a medium NAS-FPN (ResNet-18, 3@96 at 256), or the demo's with --set. The sides alternate
in one run, each with its own loader on images generated in a temporary folder; each process takes General.batch_image
images per step, so that 100 % is a process not slowed down by the other. Needs two free cores. Linux only: processes
are bound to cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.cli import run
from utils.make_demo_dataset import make_demo_dataset

DEMO = Path(__file__).parents[1] / "config" / "demo" / "retina_r18v1b_nasfpn_128_2@48_demo.py"
SIZE = 128  # side of the generated images
MEDIUM = (
    "ResizeParam.short=256",
    "ResizeParam.long=256",
    "BackboneParam.num_filter=64",
    "General.batch_image=2",
    "NeckParam.dim_reduced=96",
    "NeckParam.num_stage=3",
    "RpnParam.head.conv_channel=96",
)
WARM_UP = 2  # steps that are not timed


def measure(rank: int, size: int, core: int, store: str, overrides: Sequence[str], steps: int) -> float:
    """Return images per second of this rank of `size`, with the step, loader and group of a training."""
    os.sched_setaffinity(0, {core})
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    import torch
    import torch.distributed as dist

    from config.load import load_config
    from core.data.loader import make_train_loader
    from core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
    from core.engine.trainer import build_trainer

    torch.set_num_threads(1)
    group = SINGLE_PROCESS
    if size > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        group = ProcessGroup(rank, size)
    sets = [*overrides, f"KvstoreParam.processes={size}", "KvstoreParam.gpus=()", "General.loader_worker=0"]
    config = load_config(str(DEMO), is_train=True, overrides=sets)
    loader = make_train_loader(config, rank=rank, world_size=size)
    loader.end_step = WARM_UP + steps
    trainer, _ = build_trainer(config, torch.device("cpu"), loader.iter_per_epoch, None, group)
    num_image, start = 0, 0.0
    for step, batch in enumerate(loader):
        if step == WARM_UP:
            start = time.perf_counter()
        trainer.step([batch], step)
        num_image += len(batch["files"]) if step >= WARM_UP else 0
    seconds = time.perf_counter() - start
    if size > 1:
        dist.destroy_process_group()
    return num_image / seconds


def images_per_second(cores: Sequence[int], joined: bool, folder: Path, overrides: Sequence[str], steps: int) -> float:
    """Return the mean over processes, one per core at the same time, that train together or independently."""
    size = len(cores) if joined else 1
    store = Path(tempfile.mkdtemp(dir=folder), "store").as_uri()
    with ProcessPoolExecutor(len(cores), mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(measure, i % size, size, core, store, overrides, steps) for i, core in enumerate(cores)]
        return statistics.mean(process.result() for process in waiting)


def compare(name: str, overrides: Sequence[str], folder: Path, steps: int, rounds: int) -> None:
    """Measure all sides in turn, and the medians. A process alone alternates between the two cores."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    print(f"{name}: {steps} steps per side and round, images per second of a process")
    print("            alone   two apart   two together   together/alone   together/apart")
    rows = []
    for turn in range(rounds):
        sides = (([cores[turn % 2]], False), (cores, False), (cores, True))
        alone, apart, together = (images_per_second(*side, folder, overrides, steps) for side in sides)
        rows.append((alone, apart, together, together / alone, together / apart))
        _print_row(f"round {turn + 1}", rows[-1])
    _print_row("median", [statistics.median(column) for column in zip(*rows, strict=True)])


def _print_row(name: str, row: Sequence[float]) -> None:
    alone, apart, together, of_alone, of_apart = row
    print(
        f"  {name:8} {alone:6.2f}   {apart:9.2f}   {together:12.2f}   {of_alone:14.1%}   {of_apart:14.1%}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time two processes that train together beside one alone.")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--steps", type=int, default=20, help=f"timed steps per side, after {WARM_UP} to warm up")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.rounds) < 1:
        raise ValueError("--steps and --rounds: expected 1 or more")
    if len(os.sched_getaffinity(0)) < 2:
        raise ValueError("expected two cores that this process may use, got one: run it where there are two")
    networks = {"the demo": (), "NAS-FPN 3@96 at 256": MEDIUM}
    if arguments.set:
        networks = {f"the demo with {' '.join(arguments.set)}": tuple(arguments.set)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["NECKLACE_CACHE"] = str(folder / "cache")
        make_demo_dataset(folder / "demo", train=200, val=1, size=SIZE, seed=0)
        for network, overrides in networks.items():
            sets = [*overrides, f"DatasetParam.data_root={folder}"]
            compare(network, sets, folder, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    run(main)
