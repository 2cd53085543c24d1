"""A part of stage 6, as a process of its own: the train graph compiled by torch.compile."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch._dynamo.utils import counters

from utils.acceptance.context import Context, seconds_each, wait
from utils.acceptance.networks import NASFPN_640
from utils.acceptance.stage.speed import build, stepper


def run(context: Context) -> None:
    images, backend = (1, "eager") if context.small else (8, "inductor")
    precision = "float32" if context.small else "bfloat16"
    trainer = build(context, NASFPN_640, precision, *(["NeckParam.num_stage=1"] if context.small else []))
    repeats, warmup = (1, 0) if context.small else (10, 3)
    off = seconds_each(context.device, stepper(trainer, images), repeats, warmup)
    compiled = replace(trainer, module=cast(nn.Module, torch.compile(trainer.module, backend=backend)))
    step = stepper(compiled, images)
    began = time.perf_counter()
    step()
    wait(context.device)
    first = time.perf_counter() - began
    on = seconds_each(context.device, step, repeats, warmup)
    breaks = sum(counters["graph_break"].values())
    values = {"off, ms": 1e3 * off, "on, ms": 1e3 * on, "gain %": 100 * (off / on - 1), "graph breaks": breaks}
    context.record("torch.compile", backend=backend, images=images, **values, **{"first step s": first})
