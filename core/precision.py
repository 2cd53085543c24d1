"""What a network computes in: float32, or a half type between the input and the last convolutions of the head.

Weights, batch statistics, those convolutions, the losses and the update are float32 in any case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from config.schema import General

Precision = Literal["float32", "float16", "bfloat16"]

LOSS_SCALE = "loss_scale"  # its name in a checkpoint
FIRST_SCALE = 2.0**16
LARGEST_SCALE = 2.0**24
GROWTH_INTERVAL = 2000  # steps without overflow, after which the scale is doubled
MOST_SKIPPED = 25  # steps in a row; more are no search for a scale


def asked_for(general: General) -> Precision:
    """What a GPU that has it computes in."""
    if general.bf16:
        return "bfloat16"
    return "float16" if general.fp16 else "float32"


def precision(general: General, device: torch.device) -> tuple[Precision, str]:
    """What General.fp16 and bf16 come to on a device, and a line for the log.

    A CPU computes in bfloat16, in place of float16 too, where its processor does that in hardware; else in float32.
    """
    asked = "bf16" if general.bf16 else "fp16"
    wanted = asked_for(general)
    if wanted == "float32":
        return wanted, "computing in float32"
    if device.type == "cuda":
        if wanted == "bfloat16" and torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            return "float16", f"General.bf16 is set; {name} has no bfloat16: computing in float16"
        return wanted, f"computing in {wanted}"
    if cpu_has_bfloat16():
        return "bfloat16", f"General.{asked} is set: computing in bfloat16, this processor's half type"
    return "float32", f"General.{asked} is set; this processor has no half type: computing in float32"


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Does the processor multiply in bfloat16 (AVX512-BF16 or AMX)? Known on Linux alone."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags


class LossScale:
    """The factor on a float16 run's loss that keeps small gradients from vanishing, found as the run goes.

    It is halved, and the step skipped, where a gradient overflows; doubled after GROWTH_INTERVAL steps without.
    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2, with a factor that adapts.
    """

    def __init__(self) -> None:
        self.value = FIRST_SCALE
        self.skipped = 0  # steps of the run
        self.skipped_in_a_row = 0
        self._fine = 0  # steps since the last change

    @property
    def is_lost(self) -> bool:
        """No scale helps: what overflows is not the gradient alone."""
        return self.skipped_in_a_row >= MOST_SKIPPED

    def update(self, finite: bool) -> None:
        """After a step: were its gradients finite?"""
        if not finite:
            self.value /= 2
            self.skipped += 1
            self.skipped_in_a_row += 1
            self._fine = 0
            return
        self.skipped_in_a_row = 0
        self._fine += 1
        if self._fine >= GROWTH_INTERVAL:
            self.value = max(self.value, min(2 * self.value, LARGEST_SCALE))
            self._fine = 0

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: one tensor (4,) float64."""
        row = [self.value, self.skipped, self.skipped_in_a_row, self._fine]
        return {LOSS_SCALE: torch.tensor(row, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The reverse; a state without a scale, of a run in another precision, changes nothing.

        Raises ValueError for numbers that no run has; nothing was loaded.
        """
        row = state.get(LOSS_SCALE)
        if row is None:
            return
        numbers = row.double().flatten().tolist()
        whole = all(math.isfinite(number) and number >= 0 for number in numbers)
        if len(numbers) != 4 or not whole or numbers[0] == 0:
            raise ValueError(f"the checkpoint is damaged: {LOSS_SCALE} is {numbers[:4]}, not a scale and three counts")
        self.value = numbers[0]
        self.skipped, self.skipped_in_a_row, self._fine = map(int, numbers[1:])
