"""Stage 6: the options that are meant to make a step faster, each on and off in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from config.section import fill
from symbol import Symbol
from symbol.graph import Entry, Node
from symbol.passes.rewrite import rewrite, with_inputs
from utils.acceptance.context import Context, python, seconds_each
from utils.acceptance.networks import NARROW, NASFPN_640, config_of, trainer_of
from utils.acceptance.stage.speed import build, release, stepper
from utils.benchmark_step import random_batch

LEAST_TO_COMPILE = 20.0  # seconds
COMPARED = 10  # steps


def run(context: Context) -> None:
    for images in (1,) if context.small else (8, 64):
        for name, option in OPTIONS.items():
            release()
            context.attempt(f"{name}, {images} images", partial(option, context, name, images))
    context.attempt("CUDA graph against eager", partial(_graph_equals_eager, context))
    context.attempt("torch.compile", partial(_compiled, context))


def _precision(context: Context) -> str:
    return "float32" if context.small else "bfloat16"


def _time(context: Context, step: Callable[[], object]) -> float:
    repeats, warmup = (1, 1) if context.small else (10, 4)
    return seconds_each(context.device, step, repeats, warmup)


def _record(context: Context, option: str, images: int, off: float, on: float) -> None:
    values = {"off, ms": 1e3 * off, "on, ms": 1e3 * on, "gain %": 100 * (off / on - 1)}
    context.record("options", option=option, images=images, **values)


def _benchmark(context: Context, name: str, images: int) -> None:
    step = stepper(build(context, NASFPN_640, _precision(context)), images)
    before = torch.backends.cudnn.benchmark
    times = []
    for on in (False, True):
        torch.backends.cudnn.benchmark = on
        times.append(_time(context, step))
    torch.backends.cudnn.benchmark = before
    _record(context, name, images, *times)


def _channels_last(context: Context, name: str, images: int) -> None:
    """Time it on, then off: weights and pixels in the default layout, from which the rest follows."""
    trainer = build(context, NASFPN_640, _precision(context))
    step = stepper(trainer, images)
    on = _time(context, step)
    for parameter in trainer.module.parameters():
        parameter.data = parameter.data.contiguous()
    for value in trainer.optimizer.state_dict().values():
        value.data = value.data.contiguous()

    def default_layout(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "data": kwargs["data"].contiguous()}

    trainer.module.register_forward_pre_hook(default_layout, with_kwargs=True)
    _record(context, name, images, _time(context, step), on)


def _half_predictions(context: Context, name: str, images: int) -> None:
    """Time it off, then on: the head's last convolutions compute in the half type too; results become float32."""
    off = _time(context, stepper(build(context, NASFPN_640, _precision(context)), images))
    release()
    precision = _precision(context)
    config = config_of(NASFPN_640, context.device, precision, *(NARROW if context.small else ()))
    fill(config.ModelParam, "train_symbol", cast_behind_convolutions(config.ModelParam.train_symbol))
    trainer = trainer_of(config, context.device)
    _record(context, name, images, off, _time(context, stepper(trainer, images)))


def cast_behind_convolutions(graph: Symbol) -> Symbol:
    """The graph with every cast to float32 before a convolution moved behind it."""

    def replace(node: Node, inputs: tuple[Entry, ...]) -> Node | Entry:
        before = inputs[0][0] if inputs else node
        if node.op != "Convolution" or before.op != "Cast" or before.attrs["dtype"] != "float32":
            return with_inputs(node, inputs)
        moved = Node(node.op, node.name, (before.inputs[0], *inputs[1:]), node.attrs, node.hints)
        return Node("Cast", f"{node.name}_fp32", ((moved, 0),), MappingProxyType(dict(before.attrs)), before.hints)

    return rewrite(graph, replace)


def _cuda_graph(context: Context, name: str, images: int) -> None:
    """Time it off, then on; the batch transforms and the update are as they are."""
    off_on = []
    for on in (False, True):
        sets = (f"General.cuda_graph={on}", f"General.batch_image={images}")
        trainer = build(context, NASFPN_640, _precision(context), *sets)
        if on and trainer.graphed is None:
            context.skip(f"{name}, {images} images", "a CPU has no CUDA graphs")
            return
        off_on.append(_time(context, stepper(trainer, images)))
    _record(context, name, images, *off_on)


def _graph_equals_eager(context: Context) -> None:
    """Compare steps with and without CUDA graphs in a deterministic run: they may differ by what eager steps differ
    from each other, which is nothing if all operators are deterministic."""
    what = f"{COMPARED} steps with a CUDA graph equal eager ones"
    eager, repeated, graphed = (compared_steps(context, on) for on in (False, False, True))
    if context.small:
        context.skip(what, "a CPU has no CUDA graphs")
        return
    own, found = (float((other / eager - 1).abs().max()) for other in (repeated, graphed))
    context.check(what, found <= 10 * own, difference=found, eager_difference=own)


def compared_steps(context: Context, uses_graph: bool) -> torch.Tensor:
    """Return losses and gradient norm (COMPARED, L + 1) of steps on two batches in turn, of the narrow network."""
    release()
    sets = ("General.deterministic=True", f"General.cuda_graph={uses_graph}")
    trainer = trainer_of(config_of(NASFPN_640, context.device, _precision(context), *NARROW, *sets), context.device)
    first = random_batch(trainer.config, context.device)
    second = first.copy()
    second["image"] = 255 - first["image"]
    steps = [trainer.step([(first, second)[i % 2].copy()], i) for i in range(COMPARED)]
    if uses_graph and not context.small:
        notes = [note for step in steps for note in step.notes]
        context.check("a CUDA graph is recorded", any("are a CUDA graph" in note for note in notes), notes=notes)
    return torch.stack([step.values for step in steps]).double().cpu()


def _compiled(context: Context) -> None:
    """Compile in a process that can be stopped: it may take minutes."""
    if context.time_left < LEAST_TO_COMPILE and not context.small:
        context.record("torch.compile", outcome=f"not tried: {context.time_left:.0f} s were left")
        return
    limit = context.time_left
    folders = ["--out", str(context.out), "--work", str(context.work), "--deadline", f"{context.deadline - 3:.1f}"]
    command = python("-m", "utils.acceptance", "utils.acceptance.stage.compiled", "--stage", str(context.stage))
    status, printed = context.run([*command, "--device", context.device.type, *folders])
    if status is None:
        context.record("torch.compile", outcome=f"compiling took longer than {limit:.0f} s")
    else:
        context.check("torch.compile works", status == 0, says="" if status == 0 else printed[-500:])


OPTIONS: dict[str, Callable[[Context, str, int], None]] = {
    "cudnn.benchmark": _benchmark,
    "channels-last": _channels_last,
    "half prediction convolutions": _half_predictions,
    "CUDA graph of forward and backward": _cuda_graph,
}
