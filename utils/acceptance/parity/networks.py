"""Stage 3: the device's numbers against the CPU's in float64.

At its first weights a network of many batch normalizations enlarges a rounding some 100,000 times on the way to its
gradients (float32 on a CPU is off by 0.6 % for the demo, by 4 % for the narrow NAS-FPN). So float64 is held to 1e-9,
float32 to the CPU's own distance from float64, and the shorter types to their losses; their gradients are compared
operator by operator, in `by_operator`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import symbol as S
from config.schema import Config
from core.engine.device import move_module
from core.engine.trainer import transform_batches
from models.record import Batch, select
from symbol.passes import in_precision
from utils.acceptance.context import Context, set_tf32
from utils.acceptance.networks import DEMO, NARROW, NASFPN_640, config_of, moved, scene_batch
from utils.acceptance.parity import by_operator, steps

NETWORKS = {"the demo": (DEMO, ()), "a narrow NAS-FPN": (NASFPN_640, NARROW)}
FLOAT64 = 1e-9
TIMES_CPU = 5.0  # float32: at most so many times as far from float64 as the CPU
LEAST_FLOAT32 = 1e-5
# of a loss: a unit roundoff of 2**-11 or 2**-8, enlarged a few times
LOSS_BOUNDS = {"TF32": 0.02, "float16": 0.02, "bfloat16": 0.1}
LARGE = 0.01  # a gradient counts as large from this share of all gradients' norm
FLOAT16_SCALE = 2.0**10


class Computed(NamedTuple):
    """The results of a step before its update, on the CPU in float64."""

    losses: Tensor
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]


def run(context: Context) -> None:
    for name, (path, sets) in list(NETWORKS.items())[: 1 if context.small else None]:
        config = config_of(path, context.device, "float32", *sets)
        context.attempt(f"targets of {name}", partial(_targets, context, name, config))
        context.attempt(f"{name} against float64", partial(_network, context, name, path, sets))
    context.attempt("operators one by one", partial(by_operator.run, context))
    steps.run(context)


def _targets(context: Context, name: str, config: Config) -> None:
    """The batch transforms on the device: the labels are equal, targets and pixels to rounding."""
    here, there = scene_batch(config), scene_batch(config)
    there = moved(there, context.device)
    transform_batches(config, [here])
    transform_batches(config, [there])
    same = torch.equal(here["rpn_cls_label"], there["rpn_cls_label"].cpu())
    context.check(f"labels of {name} are equal", same, foreground=int((here["rpn_cls_label"] >= 1).sum()))
    for key in ("rpn_reg_target", "rpn_reg_weight", "data"):
        off = (select(here, [key])[key] - select(there, [key])[key].cpu()).abs().max().item()
        context.check(f"{key} of {name} agrees", off <= 1e-5, largest_difference=off, bound=1e-5)


def _network(context: Context, name: str, path: Any, sets: tuple[str, ...]) -> None:
    cpu = torch.device("cpu")
    # with fp16 the graph has its casts, which in_precision takes out again
    config = config_of(path, cpu, "float16", *sets)
    batch = scene_batch(config)
    transform_batches(config, [batch])
    expected = compute(config, batch, cpu, "float64")
    errors = distances(compute(config, batch, context.device, "float64"), expected)
    _check(context, f"{name} in float64", errors, dict.fromkeys(errors, FLOAT64))
    of_cpu = distances(compute(config, batch, cpu, "float32"), expected)
    bounds = {part: max(LEAST_FLOAT32, TIMES_CPU * error) for part, error in of_cpu.items()}
    errors = distances(compute(config, batch, context.device, "float32"), expected)
    _check(context, f"{name} in float32", errors, bounds)
    for precision, bound in LOSS_BOUNDS.items():
        if context.small and precision in ("TF32", "float16"):
            context.skip(f"{name} in {precision}", "a CPU has no TF32, and is slow in float16")
            continue
        found = compute(config, batch, context.device, precision)
        errors = distances(found, expected)
        finite = all(bool(gradient.isfinite().all()) for gradient in found.gradients.values())
        what = f"{name} in {precision}: losses agree, gradients are finite"
        context.check(what, errors["losses"] <= bound and finite, bound=bound, **errors)


def compute(config: Config, batch: Batch, device: torch.device, precision: str) -> Computed:
    """Losses, gradients and moving statistics of a batch that is transformed, from the first weights.

    The batch's numbers are the same for every device and precision: what differs is the network.
    """
    set_tf32(precision == "TF32")
    compute_dtype: Any = precision if precision in ("float16", "bfloat16") else "float32"
    module = S.lower(in_precision(config.ModelParam.train_symbol, compute_dtype), seed=0)
    wide = torch.float64 if precision == "float64" else torch.float32
    move_module(module, device).train().to(wide)
    given = select(batch, config.data_name + config.label_name)
    inputs = {name: value.to(device, wide) for name, value in given.items()}
    losses = torch.stack([loss.reshape(()) for loss in module(**inputs)])  # (L,)
    scale = FLOAT16_SCALE if precision == "float16" else 1.0
    (losses.sum() * scale).backward()
    set_tf32(False)
    gradients = {name: p.grad.double().cpu() / scale for name, p in module.named_parameters() if p.grad is not None}
    statistics = {name: value.double().cpu() for name, value in module.named_buffers()}
    return Computed(losses.detach().double().cpu(), gradients, statistics)


def distances(found: Computed, expected: Computed) -> dict[str, float]:
    """Relative errors: of the worse loss; of all gradients, and of all statistics, by their norms; and of the worst
    large gradient by its own."""
    return {
        "losses": ((found.losses - expected.losses) / expected.losses).abs().max().item(),
        "gradients": _whole(found.gradients, expected.gradients),
        "worst large gradient": _worst(found.gradients, expected.gradients),
        "statistics": _whole(found.statistics, expected.statistics),
    }


def _check(context: Context, name: str, errors: dict[str, float], bounds: dict[str, float]) -> None:
    holds = all(errors[part] <= bound for part, bound in bounds.items())
    context.check(f"{name}: losses, gradients and statistics agree", holds, **errors, bounds=list(bounds.values()))


def _norm(values: Iterable[Tensor]) -> float:
    return math.sqrt(sum(value.square().sum().item() for value in values))


def _whole(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return _norm(found[name] - value for name, value in expected.items()) / _norm(expected.values())


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    least = LARGE * _norm(expected.values())
    large = [name for name, value in expected.items() if _norm([value]) >= least]
    return max(_norm([found[name] - expected[name]]) / _norm([expected[name]]) for name in large)
