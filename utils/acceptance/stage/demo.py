"""Stage 9: the demo by a user's commands, on the device and on the CPU; a resume; two processes.

The CPU's training is started ahead, as `demo_on_cpu`: it takes the longest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from operator_cxx.build import usable_cpus
from utils.acceptance.ap import average_precision
from utils.acceptance.context import ROOT, Context, child_environment, python
from utils.acceptance.networks import DEMO

AP_BOUND = 0.02
SHORT = "OptimizeParam.schedule.lr_epoch=()"
RESERVE = 25.0  # seconds kept for testing what was trained
SMALL = (
    "General.batch_image=4",
    "BackboneParam.num_filter=8",
    "NeckParam.dim_reduced=8",
    "NeckParam.num_stage=1",
    "RpnParam.head.conv_channel=8",
    "OptimizeParam.schedule.lr_epoch=()",
    "OptimizeParam.schedule.end_epoch=2",
)
STATUS = "cpu.json"  # of the training that was started ahead
ANNOTATION = Path("data", "demo", "annotations", "instances_val.json")


def run(context: Context) -> None:
    if not _wait_for(context, context.work / ANNOTATION, 60.0):
        context.check("the demo's images are drawn", False)
        return
    trained = Training(context, "device")
    context.attempt("a resume", partial(_resume, context, trained))
    context.attempt("two processes", partial(_two_processes, context))
    context.attempt("the demo's AP", partial(_compare_ap, context, trained))


class Training:
    """A training of the demo by the user's command, running beside."""

    def __init__(self, context: Context, name: str, *sets: str, resume: bool = False, on: str = "") -> None:
        self.folder = context.work / name
        gpus = on or ("cpu" if context.small else "0")
        self._common = ["--config", str(DEMO), "--gpus", gpus, "--data-root", str(context.work / "data")]
        sets = (*(SMALL if context.small else ()), "TestParam.eval_epoch=0", *sets)
        sets = (*sets, f"General.output_root={self.folder}", "General.loader_worker=2")
        self._common += [word for one in sets for word in ("--set", one)]
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "output.txt").open("a", encoding="utf-8") as output:
            self._process = self._start("detection_train.py", ["--resume"] if resume else [], output)

    def _start(self, program: str, more: list[str], output: Any) -> subprocess.Popen[bytes]:
        # a cache of its own: the index is not shared while it is made
        variables = child_environment({"NECKLACE_CACHE": str(self.folder / "cache")})
        command = python(program, *self._common, *more)
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT)

    def finish(self, timeout: float) -> None:
        """Wait for its end; RuntimeError where it failed, TimeoutExpired where it still runs after `timeout`."""
        try:
            status = self._process.wait(max(1.0, timeout))
        except subprocess.TimeoutExpired:
            self._process.terminate()
            raise
        if status:
            raise RuntimeError(f"{self.folder.name} ended with {status}: {self._tail()}")

    def test(self, timeout: float) -> float:
        """The AP of its newest checkpoint, from the json that detection_test.py writes with or without pycocotools."""
        with (self.folder / "output.txt").open("a", encoding="utf-8") as output:
            self._start("detection_test.py", [], output).wait(max(1.0, timeout))
        result = self.experiment / "demo_val_result.json"
        if not result.exists():
            raise RuntimeError(f"{result.name} was not written: {self._tail()}")
        return average_precision(self.folder.parent / ANNOTATION, result)

    def rate(self) -> float:
        """Images a second, the median over the lines of its log."""
        lines = (self.experiment / "log.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [record["img_per_s"] for record in map(json.loads, lines) if "img_per_s" in record]
        return statistics.median(rates)

    @property
    def experiment(self) -> Path:
        return self.folder / DEMO.stem

    def _tail(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")[-400:]


def on_cpu(context: Context) -> None:
    """The data set, and the demo trained on the CPU; STATUS says how it ended."""
    counts = ["--train", "16", "--val", "6"] if context.small else []
    drawn = python("utils/make_demo_dataset.py", "--out", str(context.work / "data" / "demo"), *counts)
    status, printed = context.run(drawn)
    if status != 0:
        raise RuntimeError(f"the demo's images were not drawn: {printed[-300:]}")
    # half of the cores: the stages beside it need some
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // 2)))
    training = Training(context, "cpu", on="cpu")
    outcome: dict[str, Any] = {}
    try:
        training.finish(context.time_left)
        outcome = {"AP": training.test(context.time_left), "images/s": training.rate()}
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        outcome["error"] = str(error)[-400:]
    part = context.work / "cpu.part"
    part.write_text(json.dumps(outcome), encoding="utf-8")
    part.rename(context.work / STATUS)


def _wait_for(context: Context, path: Path, seconds: float) -> bool:
    until = time.monotonic() + min(seconds, context.time_left - 5)
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)
    return path.exists()


def _compare_ap(context: Context, trained: Training) -> None:
    what = f"the demo's AP is within {AP_BOUND} of the CPU's"
    trained.finish(context.time_left - RESERVE)
    found = trained.test(context.time_left - 5)
    # other trainings run beside it: its rate is no benchmark
    context.record("the demo", on=context.device.type, AP=found, **{"images/s": trained.rate()})
    if not _wait_for(context, context.work / STATUS, context.time_left - 5):
        context.record("the demo", on="cpu", outcome="it was still training when the time was up")
        return
    outcome = json.loads((context.work / STATUS).read_text(encoding="utf-8"))
    context.record("the demo", on="cpu", **outcome)
    context.check(what, abs(found - outcome.get("AP", 2.0)) <= AP_BOUND, device=found, cpu=outcome.get("AP"))


def _resume(context: Context, trained: Training) -> None:
    """Two epochs at once, and one, a resume and the other: the checkpoints are equal, bit for bit."""
    exact = [] if context.small else ["General.deterministic=True"]
    one, two = ((SHORT, f"OptimizeParam.schedule.end_epoch={epochs}") for epochs in (1, 2))
    # in small the demo itself has two epochs
    whole = trained if context.small else Training(context, "whole", *exact, *two)
    first = Training(context, "resumed", *exact, *one)
    first.finish(context.time_left - RESERVE)
    Training(context, "resumed", *exact, *two, resume=True).finish(context.time_left - RESERVE)
    whole.finish(context.time_left - RESERVE)
    differ: list[str] = []
    files = sorted(path.name for path in whole.experiment.glob("*0002*.safetensors"))
    for name in files:
        expected, found = (load_file(training.experiment / name) for training in (whole, first))
        differ += [f"{name}: {key}" for key in expected if not torch.equal(expected[key], found[key])]
    values = {"files": len(files), "differ": len(differ), "first": differ[:5]}
    context.check("a resume gives the same checkpoint, bit for bit", bool(files) and not differ, **values)


def _two_processes(context: Context) -> None:
    if context.small or torch.cuda.device_count() < 2:
        context.skip("two processes", f"it takes two GPUs, there is {torch.cuda.device_count()}")
        return
    training = Training(context, "two", SHORT, "OptimizeParam.schedule.end_epoch=1", on="0,1")
    training.finish(context.time_left - RESERVE)
    context.record("two processes", **{"images/s of both": training.rate()})
