"""Benchmark a training step or a test of a config, in total and by part, on random images.

    python3 utils/benchmark_step.py --config config/demo/retina_r18v1b_nasfpn_128_2@48_demo.py --steps 10
    python3 utils/benchmark_step.py --config config/demo/retina_r18v1b_nasfpn_128_2@48_demo.py --steps 10 --test
    python3 utils/benchmark_step.py --config config/demo/retina_r18v1b_nasfpn_128_2@48_demo.py --count

No files are read or written. Steps are those of a run, back to back without waiting for the device; the parts are timed
separately and each waits for the device, so they may sum to more. A test is timed beside the same graph without folding
and fusion, by turns, and the fastest of each is printed: seconds per batch of TestParam.batch_image images.

A count prints what a step launches and moves, without running one: the same on every machine, in the same precision.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import fx

sys.path.insert(0, str(Path(__file__).parents[1]))

from config.load import load_config
from config.schema import Config
from core.cli import run
from core.engine.device import move_module, peak_memory, select_device
from core.engine.engine import TorchEngine
from core.engine.precision import precision
from core.engine.step_count import PARTS, count_step
from core.engine.trainer import Trainer, build_trainer, transform_batches
from core.inference import apply_nms
from models.record import Batch, select
from symbol import lower
from symbol.passes import in_precision

COMMONEST = 20  # operators that a count lists


def random_batch(config: Config, device: torch.device) -> Batch:
    """Return a batch as from the loader: full-size images with 8 boxes each."""
    generator = torch.Generator().manual_seed(0)
    batch, pad = config.General.batch_image, config.PadParam
    image = torch.randint(0, 256, (batch, pad.short, pad.long, 3), dtype=torch.uint8, generator=generator)
    gt_bbox = torch.full((batch, pad.max_num_gt, 5), -1.0)
    corner = torch.rand(batch, 8, 2, generator=generator) * pad.short * 0.7
    side = pad.short * (0.05 + 0.25 * torch.rand(batch, 8, 2, generator=generator))
    gt_bbox[:, :8] = torch.cat([corner, corner + side, torch.ones(batch, 8, 1)], dim=2)
    im_info = torch.tensor([[pad.short, pad.long, 1.0]]).repeat(batch, 1)
    return {"image": image.to(device), "gt_bbox": gt_bbox.to(device), "im_info": im_info.to(device), "files": []}


def time_parts(trainer: Trainer) -> dict[str, float]:
    """Return the seconds of each part of one step, each including the device's work."""
    config = trainer.config
    batch = random_batch(config, trainer.device)
    parts, clock = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        wait(trainer.device)
        parts[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    for transform in config.transform.batch:
        transform.apply(batch)
    lap("batch transforms and targets")
    outputs = trainer.module(**select(batch, config.data_name + config.label_name))
    loss = sum(outputs[: len(config.ModelParam.train_symbol)])
    lap("forward and losses")
    trainer.optimizer.zero_grad()
    loss.backward()
    lap("backward")
    trainer.optimizer.step(1e-9)
    lap("update")
    return parts


def time_steps(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Return seconds per step, back to back as in a run, and the part of them in which the host was busy."""
    batches = [random_batch(trainer.config, trainer.device) for _ in range(steps)]
    wait(trainer.device)
    start = time.perf_counter()
    for number, batch in enumerate(batches):
        trainer.step([batch], number)
    host = time.perf_counter()
    wait(trainer.device)
    return (time.perf_counter() - start) / steps, (host - start) / steps


class PartTimer(fx.Interpreter):
    """Runs a test graph node by node and adds up the seconds of its parts, each with the device's work."""

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        super().__init__(module)
        self.device = device
        self.seconds = dict.fromkeys(("convolutions", "scores, decoding", "other operators"), 0.0)

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        wait(self.device)
        name = getattr(n.target, "__name__", "")
        if n.op == "call_module" or name.startswith("convolution"):
            part = "convolutions"
        elif name in ("gen_anchor", "gen_proposal_retina", "concat") or n.kwargs.get("act_type") == "sigmoid":
            part = "scores, decoding"
        else:
            part = "other operators"
        self.seconds[part] += time.perf_counter() - start
        return result


def time_test(config: Config, device: torch.device, steps: int) -> dict[str, float]:
    """Return the least seconds of the test graph as built, as folded and fused, of its parts and of NMS."""
    dtype, _ = precision(config.General, device)
    graph, resize = in_precision(config.ModelParam.test_symbol, dtype), config.ResizeParam
    shape = (config.TestParam.batch_image, 3, resize.short, resize.long)
    plain = lower(graph, seed=0, data=shape)
    folded, _ = TorchEngine().build_detector(config, plain.state_dict(), device, "random weights")
    assert isinstance(folded, fx.GraphModule)
    modules = {"graph as built": move_module(plain, device).eval(), "graph folded and fused": folded}
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "data": torch.randn(shape, generator=generator).to(device),
        "im_info": torch.tensor([[resize.short, resize.long, 1.0]]).repeat(shape[0], 1).to(device),
    }
    best: dict[str, float] = {}
    with torch.inference_mode():
        for turn in range(steps + 2):
            seconds = {}
            for name, module in modules.items():
                start = time.perf_counter()
                candidates = module(**inputs)
                wait(device)
                seconds[name] = time.perf_counter() - start
            timer = PartTimer(folded, device)
            timer.run(*(inputs[node.target] for node in folded.graph.nodes if node.op == "placeholder"))
            seconds |= {f"  {part}": value for part, value in timer.seconds.items()}
            start = time.perf_counter()
            apply_nms(config, *candidates)
            wait(device)
            seconds["NMS"] = time.perf_counter() - start
            if turn >= 2:
                best = {name: min(value, best.get(name, value)) for name, value in seconds.items()}
    return best


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step or a test of a config, part by part.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after two that are not")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--test", action="store_true", help="time the test graph and NMS")
    what.add_argument("--count", action="store_true", help="count the operators of a step and the bytes that they move")
    arguments = parser.parse_args()
    overrides = ["ModelParam.from_scratch=True", *arguments.set]
    config = load_config(arguments.config, is_train=not arguments.test, overrides=overrides)
    device = select_device(config.KvstoreParam.gpus)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    batch = config.TestParam.batch_image if arguments.test else config.General.batch_image
    print(f"{config.General.name} on {name}, torch {torch.__version__}, {batch} images per step")
    if arguments.count:
        print_count(config, device)
        return
    if arguments.test:
        print_test(config, device, arguments.steps)
    else:
        print_training(config, device, arguments.steps)
    print(f"  {'peak memory':<30} {peak_memory(device) / 2**20:9.0f} MiB")


def print_training(config: Config, device: torch.device, steps: int) -> None:
    trainer, notes = build_trainer(config, device, iter_per_epoch=1000, start=None)
    time_steps(trainer, 2)
    step, host = time_steps(trainer, steps)
    times = [time_parts(trainer) for _ in range(steps)]
    print(f"  {'; '.join([*notes, *trainer.describe()])}")
    for part in times[0]:
        print(f"  {part:<30} {1000 * statistics.median(row[part] for row in times):9.1f} ms")
    print(f"  {'step, back to back':<30} {1000 * step:9.1f} ms")
    print(f"  {'of it the host':<30} {1000 * host:9.1f} ms")
    print(f"  {config.General.batch_image / step:.2f} img/s")


def print_count(config: Config, device: torch.device) -> None:
    trainer, _ = build_trainer(config, device, iter_per_epoch=1000, start=None)
    batch = random_batch(config, device)
    transform_batches(config, [batch])
    count = count_step(trainer, batch)
    print(f"  {'; '.join(trainer.describe())}")
    print(f"  {'':<40} launches  MB read and written")
    for part in PARTS:
        print(f"  {part:<40} {count.launches[part]:8} {count.moved[part] / 1e6:10.0f}")
    print(f"  {'step':<40} {count.launches.total():8} {count.moved.total() / 1e6:10.0f}")
    for operator, launches in count.launches_of.most_common(COMMONEST):
        print(f"    {operator:<38} {launches:8} {count.moved_by[operator] / 1e6:10.0f}")
    for line in count.not_channels_last or ["every map is channels-last"]:
        print(f"  {line}")


def print_test(config: Config, device: torch.device, steps: int) -> None:
    print(f"  {precision(config.General, device)[1]}")
    times = time_test(config, device, steps)
    for part, seconds in times.items():
        print(f"  {part:<30} {1000 * seconds:9.1f} ms")
    print(f"  {times['graph as built'] / times['graph folded and fused']:.2f} times as fast as the graph as built")


if __name__ == "__main__":
    run(main)
