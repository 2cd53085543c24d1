"""Memory of a training step, and the plan of recomputation (activation checkpointing) that reduces it (memonger).

Weights, gradients, momentum and the activations saved for the backward pass are counted; workspaces of convolutions,
gradients of activations, the batch and the outputs of metrics are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from symbol import Symbol
from symbol.memory import Activations, Plan, count_activations, smallest, within

if TYPE_CHECKING:
    from config.schema import ModelParam

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class StepMemory:
    """Memory that a step of `batch_image` images holds on a device."""

    batch_image: int
    num_parameter: int
    counted: Activations
    plan: Plan | None = None

    @property
    def parameter_bytes(self) -> int:
        """Weights, gradients and momentum, in float32."""
        return 12 * self.num_parameter

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + (self.plan.peak_bytes if self.plan is not None else self.counted.kept_bytes)

    def lines(self) -> list[str]:
        """Return the memory by kind, and the effect of the plan if there is one, as lines to print."""
        kept = self.counted.kept_bytes
        size = f"{4 * self.num_parameter / MIB:,.0f} MiB"
        lines = [f"weights: {size}", f"gradients: {size}", f"momentum: {size}"]
        lines.append(f"activations of {self.batch_image} images: {kept / MIB:,.0f} MiB")
        lines.append(f"in total about {(self.parameter_bytes + kept) / MIB:,.0f} MiB")
        if self.plan is not None:
            lines += [self.plan.describe(), f"with memonger in total about {self.total_bytes / MIB:,.0f} MiB"]
        return lines


def step_memory(symbol: Symbol, model_param: ModelParam, batch_image: int, short: int, long: int) -> StepMemory:
    """Count the memory of a train graph, as lowered, for images (3, short, long); ModelParam.memonger adds a plan.

    Raises ValueError for a memonger_until that names no operator, and for a memonger_budget that no plan meets.
    """
    shape = (batch_image, 3, short, long)
    fixed = () if model_param.from_scratch else tuple(model_param.pretrain.fixed_param)
    arguments, _, _ = symbol.infer_shape(data=shape)
    inputs = set(symbol.list_inputs())
    sizes = {name: shape for name, shape in zip(symbol.list_arguments(), arguments, strict=True) if name not in inputs}
    counted = count_activations(symbol, {"data": shape}, fixed)
    memory = StepMemory(batch_image, sum(map(math.prod, sizes.values())), counted)
    if not model_param.memonger:
        return memory
    return replace(memory, plan=_plan(memory, model_param.memonger_until, model_param.memonger_budget))


def plan_recompute(symbol: Symbol, model_param: ModelParam, batch_image: int, short: int, long: int) -> Plan | None:
    """Return the plan for `symbol.lower(symbol, recompute=plan.segments)`; None unless ModelParam.memonger is set.

    Raises as `step_memory` does.
    """
    return step_memory(symbol, model_param, batch_image, short, long).plan if model_param.memonger else None


def _plan(memory: StepMemory, until: str | None, budget: float | None) -> Plan:
    counted = memory.counted
    if budget is None:
        return smallest(counted, until)
    plan = within(counted, budget * GIB - memory.parameter_bytes, until)
    if plan is None:
        least = memory.parameter_bytes + smallest(counted, until).peak_bytes
        prefix = f" up to {until}" if until else ""
        # rounded up, so that the number fits when it is written into the config
        raise ValueError(
            f"ModelParam.memonger_budget: expected at least {math.ceil(100 * least / GIB) / 100:.2f} GiB, the least "
            f"that a step of {memory.batch_image} images holds with recomputation{prefix}; got {budget:g}: "
            "raise it, or lower General.batch_image or the input size"
        )
    return plan
