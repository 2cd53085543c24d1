"""Stage 6: the options that are meant to make a step faster, each on and off in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from config.section import fill
from core.engine.trainer import Trainer, transform_batches
from models.record import select
from symbol import Symbol
from symbol.graph import Entry, Node
from symbol.passes.rewrite import rewrite, with_inputs
from utils.acceptance.context import Context, python, seconds_each
from utils.acceptance.networks import NARROW, NASFPN_640, config_of, trainer_of
from utils.acceptance.stage.speed import build, release, stepper
from utils.benchmark_step import random_batch

LEAST_TO_COMPILE = 20.0  # seconds


def run(context: Context) -> None:
    for images in (1,) if context.small else (8, 64):
        for name, option in OPTIONS.items():
            release()
            context.attempt(f"{name}, {images} images", partial(option, context, name, images))
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
    """Time it off, then on: forward and backward pass as one CUDA graph; batch transforms and update as they are."""
    if context.small:
        context.skip(f"{name}, {images} images", "a CPU has no CUDA graphs")
        return
    trainer = build(context, NASFPN_640, _precision(context))
    off = _time(context, stepper(trainer, images))
    _record(context, name, images, off, _time(context, graphed(trainer, images)))


def graphed(trainer: Trainer, images: int) -> Callable[[], object]:
    """A step whose forward and backward pass is replayed; the metric is left out."""
    config = trainer.config
    config.General.batch_image = images
    raw, names = random_batch(config, trainer.device), config.data_name + config.label_name
    first = raw.copy()
    transform_batches(config, [first])
    inputs = {name: value.clone() for name, value in select(first, names).items()}

    def forward_backward() -> torch.Tensor:
        losses = trainer.module(**inputs)[: len(config.ModelParam.train_symbol)]
        loss = torch.stack([one.reshape(()) for one in losses]).sum()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            trainer.optimizer.zero_grad()
            forward_backward()
    torch.cuda.current_stream().wait_stream(side)
    trainer.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward_backward()
    gradients = [p.grad for p in trainer.module.parameters() if p.grad is not None]

    def step() -> torch.Tensor:
        batch = raw.copy()
        transform_batches(config, [batch])
        for name, value in select(batch, names).items():
            inputs[name].copy_(value)
        graph.replay()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        trainer.optimizer.step(1e-9)
        return norm

    return step


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
