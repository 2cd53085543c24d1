"""Stage 3, whole training steps: without images, on another stream, twice, without waiting, in one layout."""

from __future__ import annotations

import traceback
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.engine.trainer import Trainer
from models.record import Batch
from utils.acceptance.context import ROOT, Context, wait
from utils.acceptance.networks import (
    NARROW,
    NASFPN_640,
    config_of,
    moved,
    scene_batch,
    trainer_of,
)

STREAM_BOUND = 1e-3  # of all values' norm, between two runs of a step whose sums are ordered differently


def run(context: Context) -> None:
    for precision in ("float32",) if context.small else ("float32", "bfloat16", "float16"):
        context.attempt(f"channels-last in {precision}", partial(_channels_last, context, precision))
        context.attempt(f"no wait in {precision}", partial(_no_wait, context, precision))
    context.attempt("a batch without images", partial(_without_images, context))
    context.attempt("a side stream", partial(_side_stream, context))
    for deterministic in (False,) if context.small else (False, True):
        for precision in ("float32",) if context.small else ("float32", "bfloat16"):
            name = f"the same step twice in {precision}"
            context.attempt(name, partial(_twice, context, precision, deterministic))


def _trainer(context: Context, precision: str, *sets: str) -> Trainer:
    config = config_of(NASFPN_640, context.device, precision, *NARROW, *sets)
    return trainer_of(config, context.device)


def _batch(trainer: Trainer, num_image: int | None = None) -> Batch:
    return moved(scene_batch(trainer.config, num_image), trainer.device)


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """Gradients, weights, statistics and momentum."""
    module = trainer.module
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    momentum = {f"momentum of {name}": value for name, value in trainer.state().items()}
    return {name: value.detach().clone() for name, value in {**gradients, **module.state_dict(), **momentum}.items()}


class _Convolutions(TorchDispatchMode):
    """Note the layout of every convolution's input and of the gradient of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.count = {"input": 0, "gradient": 0}
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self._note("input", args[0])
        elif func is torch.ops.aten.convolution_backward.default:
            self._note("gradient", args[0])
            self._note("input", args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, what: str, value: Tensor) -> None:
        self.count[what] += 1
        if not value.is_contiguous(memory_format=torch.channels_last):
            self.others.append(f"{what} {tuple(value.shape)}, strides {value.stride()}")


def _channels_last(context: Context, precision: str) -> None:
    trainer = _trainer(context, precision)
    with _Convolutions() as seen:
        trainer.step([_batch(trainer)], 0)
    wait(context.device)
    holds = not seen.others and min(seen.count.values()) > 0
    what = f"convolutions' inputs and gradients are channels-last in {precision}"
    context.check(what, holds, seen=sum(seen.count.values()), others=len(seen.others), first=seen.others[:5])


def _no_wait(context: Context, precision: str) -> None:
    """A step, after those that set things up, waits for the device nowhere."""
    what = f"a step waits for the device nowhere in {precision}"
    if context.small:
        context.skip(what, "a CPU does not run behind")
        return
    trainer = _trainer(context, precision)
    batches = [_batch(trainer) for _ in range(4)]
    for step in range(2):
        trainer.step([batches[step]], step)
    wait(context.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        trainer.step([batches[2]], 2)
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "called a synchronizing" in str(one.message)]
    places = sorted({f"{one.filename.removeprefix(f'{ROOT}/')}:{one.lineno}" for one in waits})
    error = None
    try:
        torch.cuda.set_sync_debug_mode("error")
        trainer.step([batches[3]], 3)
    except RuntimeError as raised:
        frames = [frame for frame in traceback.extract_tb(raised.__traceback__) if frame.filename.startswith(str(ROOT))]
        error = f"{raised} in {frames[-1].filename.removeprefix(f'{ROOT}/')}:{frames[-1].lineno}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    context.check(what, error is None and not places, waits=len(waits), places=places[:20], error=error)


def _without_images(context: Context) -> None:
    """A rank whose share of an epoch's last step is empty: losses are finite, the statistics stay."""
    trainer = _trainer(context, "float32")
    before = {name: value.clone() for name, value in trainer.module.named_buffers()}
    record = trainer.step([_batch(trainer, 0)], 0)
    finite = bool(record.values.isfinite().all())
    stay = all(torch.equal(value, before[name]) for name, value in trainer.module.named_buffers())
    finite = finite and all(bool(value.isfinite().all()) for value in trainer.module.state_dict().values())
    context.check("a batch without images", finite and stay, finite=finite, statistics_stay=stay)


def _side_stream(context: Context) -> None:
    """A step on a stream of its own: an operator that launches on another one would read what is not there yet."""
    if context.small:
        context.skip("a step on a side stream", "a CPU has no streams")
        return
    states = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        trainer = _trainer(context, "float32", "General.deterministic=True")
        batches = [_batch(trainer) for _ in range(3)]
        wait(context.device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some 10 ms: what does not queue behind it comes too early
            for step, batch in enumerate(batches):
                trainer.step([batch], step)
        wait(context.device)
        states.append(_state(trainer))
    expected, found = (torch.cat([value.double().flatten() for value in state.values()]) for state in states)
    off = ((found - expected).norm() / expected.norm()).item()
    context.check("a step on a side stream", off <= STREAM_BOUND, difference=off, bound=STREAM_BOUND)


def _twice(context: Context, precision: str, deterministic: bool) -> None:
    """Two trainings of two steps from the same weights on the same images, bit for bit."""
    states = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            trainer = _trainer(context, precision, f"General.deterministic={deterministic}")
            for step in range(2):
                trainer.step([_batch(trainer)], step)
            wait(context.device)
            states.append(_state(trainer))
    for text in sorted({str(one.message) for one in caught if "deterministic" in str(one.message)}):
        context.record("operators that torch has no deterministic one of", precision=precision, says=text[:120])
    differ = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    mode = "deterministic" if deterministic else "default"
    values = {"tensors": len(states[0]), "differ": len(differ), "first": differ[:8]}
    what = f"the same steps twice, bit for bit, in {precision}, {mode} mode"
    if deterministic or context.small:
        context.check(what, not differ, **values)
    else:  # default mode promises nothing on a GPU
        context.record("the same steps twice in default mode", precision=precision, **values)
