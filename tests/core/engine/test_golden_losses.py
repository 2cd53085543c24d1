"""The losses of the demo's first steps equal a stored list, so that a refactoring that changes them is detected.

Rounding is carried far: the demo's coarse levels have a few cells, over which BN divides by small deviations, and a
ReLU on the other side of zero moves gradients by a hundredth. In float32, 100 steps are held to what other summation
orders did to them, which only shows large errors; the same run in float64 keeps its roundings below 1e-6 for
a dozen steps, and shows the small ones: a momentum of 0.89, a decay of what should not decay.
`tests/golden/demo_losses.json` has both lists, and tolerances by range of steps beside the largest differences that
were measured.

After a change that is meant to change the losses, write the lists again:

    python3 -m tests.core.engine.test_golden_losses
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from config.load import load_config
from core.data.loader import make_train_loader
from core.engine.trainer import build_trainer
from tests.small_config import DEMO
from utils.make_demo_dataset import make_demo_dataset

GOLDEN = Path(__file__).parents[2] / "golden" / "demo_losses.json"
IMAGES = 83  # 80 of them with boxes: twice, 8 a step, are 20 steps an epoch
DEMO_IN_100_STEPS = ["OptimizeParam.schedule.end_epoch=5", "OptimizeParam.schedule.lr_epoch=3"]
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def demo_losses(data_root: Path, kind: str, steps: int, *overrides: str) -> list[list[float]]:
    """(steps, 2): cls_loss and reg_loss of each step, with the network in a type of DTYPES."""
    sets = [*DEMO_IN_100_STEPS, f"DatasetParam.data_root={data_root}", "General.loader_worker=0", *overrides]
    config = load_config(str(DEMO), is_train=True, overrides=sets)
    loader = make_train_loader(config)
    loader.end_step = steps
    trainer, _ = build_trainer(config, torch.device("cpu"), loader.iter_per_epoch, None)
    if kind != "float32":
        dtype = DTYPES[kind]
        trainer.module.to(dtype).register_forward_pre_hook(
            lambda _, positional, inputs: (positional, inputs | {"data": inputs["data"].to(dtype)}), with_kwargs=True
        )
        buffers = trainer.optimizer._momentum_buffers
        buffers.update({name: buffer.to(dtype) for name, buffer in buffers.items()})
    return [trainer.step([batch], step).values[:2].tolist() for step, batch in enumerate(loader)]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_demo_dataset(root / "demo", train=IMAGES, val=1, size=128, seed=0)
    return root


def difference(found: list[list[float]], expected: list[list[float]]) -> list[float]:
    """Of each step, the larger relative difference of its two losses."""
    rows = zip(found, expected, strict=True)
    return [max(abs(a - b) / b if math.isfinite(a) else math.inf for a, b in zip(*row, strict=True)) for row in rows]


@pytest.mark.parametrize("kind", DTYPES)
def test_the_losses_are_those_of_the_list(data_root: Path, kind: str) -> None:
    golden: dict[str, Any] = json.loads(GOLDEN.read_text())[kind]
    expected = golden["losses"]
    differences = difference(demo_losses(data_root, kind, len(expected)), expected)
    assert golden["ranges"][-1]["end"] == len(expected)
    begin = 0
    for part in golden["ranges"]:
        largest = max(differences[begin : part["end"]])
        assert largest <= part["tolerance"], f"steps {begin} to {part['end']}: {differences[begin : part['end']]}"
        begin = part["end"]


def write() -> None:
    """Replace the losses of the file; its tolerances stay."""
    torch.set_num_threads(1)
    content = json.loads(GOLDEN.read_text())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NECKLACE_CACHE"] = f"{folder}/cache"
        make_demo_dataset(Path(folder, "demo"), train=IMAGES, val=1, size=128, seed=0)
        for kind in DTYPES:
            content[kind]["losses"] = demo_losses(Path(folder), kind, content[kind]["ranges"][-1]["end"])
    rows = re.sub(r"\[\s+([^\s,]+),\s+([^\s,]+)\s+\]", r"[\1, \2]", json.dumps(content, indent=1))  # a step a line
    GOLDEN.write_text(rows + "\n")


if __name__ == "__main__":
    write()
