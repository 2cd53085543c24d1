"""What a network computes in: float32, or a half type between the input and the last convolutions of the head.

Weights, batch statistics, those convolutions, the losses and the update are float32 in any case.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
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
    """Return the type that General.fp16 and bf16 come to on a device, and a line for the log.

    A CPU computes in bfloat16, in place of float16 too, where its processor does that in hardware; else in float32.
    """
    asked = "bf16" if general.bf16 else "fp16"
    wanted = asked_for(general)
    if device.type == "cuda":
        if wanted == "bfloat16" and torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            wanted, reason = "float16", f"General.bf16 is set; {name} has no bfloat16: "
        else:
            reason = ""
        how = "TF32" if uses_tf32(general, wanted) else "IEEE float32"
        if wanted == "float32":
            return wanted, f"computing in float32, convolutions in {how}"
        return wanted, f"{reason}computing in {wanted}, float32 convolutions in {how}"
    if wanted == "float32":
        return wanted, "computing in float32"
    if cpu_has_bfloat16():
        return "bfloat16", f"General.{asked} is set: computing in bfloat16, this processor's half type"
    return "float32", f"General.{asked} is set; this processor has no half type: computing in float32"


def uses_tf32(general: General, computed_in: Precision) -> bool:
    """Whether float32 convolutions and matrix products on a GPU round their inputs to TF32 (10 bits of mantissa).

    By default a run in a half type does, since its other convolutions are no more exact, and a run in float32 does not.
    """
    return general.tf32 if general.tf32 is not None else computed_in != "float32"


def configure_arithmetic(general: General, computed_in: Precision, device: torch.device) -> None:
    """Set torch's process-wide switches for arithmetic on a GPU: TF32, and General.deterministic.

    Deterministic operators are chosen where torch has them; it warns of each one that it has not.
    """
    if device.type != "cuda":
        return
    float32 = "tf32" if uses_tf32(general, computed_in) else "ieee"
    torch.backends.cudnn.conv.fp32_precision = float32  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = float32
    torch.backends.cudnn.deterministic = general.deterministic
    if general.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, which is later
    torch.use_deterministic_algorithms(general.deterministic, warn_only=True)
    # filling is a check for programs that read memory nothing wrote, not needed for equal results
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Does the processor multiply in bfloat16 (AVX512-BF16 or AMX)? Known on Linux alone."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags


@dataclass(frozen=True)
class LossScaleState:
    """The numbers of a LossScale, read from the device."""

    value: float
    skipped: int  # steps of the run
    skipped_in_a_row: int
    growth_tracker: int  # steps without overflow since the scale last changed

    @property
    def is_lost(self) -> bool:
        """True where no scale helps: more than the gradient overflows."""
        return self.skipped_in_a_row >= MOST_SKIPPED


class LossScale:
    """Loss scale for float16, kept on the device: the factor on the loss that keeps small gradients from vanishing.

    torch's GradScaler reads found_inf on the host at every step, which makes the host wait for the device. Here the
    device decides what a step with an overflow does, and the host reads the state when it logs.

    The scale is halved where a gradient overflows, and doubled after GROWTH_INTERVAL steps without overflow.
    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2, with a factor that adapts.
    """

    def __init__(self, device: torch.device) -> None:
        self._state = torch.tensor([FIRST_SCALE, 0, 0, 0], dtype=torch.float64, device=device)

    @property
    def value(self) -> Tensor:
        """The scale, () float32 on the device."""
        return self._state[0].float()

    def update(self, found_inf: Tensor) -> None:
        """Account for a step whose gradients overflowed, or did not: found_inf is a bool () on the device."""
        scale, skipped, in_a_row, tracker = self._state.unbind()
        zero = torch.zeros_like(scale)
        grows = tracker + 1 >= GROWTH_INTERVAL
        grown = scale.maximum((2 * scale).clamp(max=LARGEST_SCALE))
        after_overflow = torch.stack([scale / 2, skipped + 1, in_a_row + 1, zero])
        otherwise = [torch.where(grows, grown, scale), skipped, zero, torch.where(grows, zero, tracker + 1)]
        self._state.copy_(torch.where(found_inf, after_overflow, torch.stack(otherwise)))

    def read(self) -> LossScaleState:
        """Return the state; the host waits for the device."""
        value, *counts = self._state.tolist()
        return LossScaleState(value, *map(int, counts))

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: one tensor (4,) float64, the fields of LossScaleState."""
        return {LOSS_SCALE: self._state.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state; one without a scale, of a run in another precision, changes nothing.

        Raises ValueError for numbers that no run has; nothing was loaded.
        """
        row = state.get(LOSS_SCALE)
        if row is None:
            return
        numbers = row.double().flatten().tolist()
        whole = all(math.isfinite(number) and number >= 0 for number in numbers)
        if len(numbers) != 4 or not whole or numbers[0] == 0:
            raise ValueError(f"the checkpoint is damaged: {LOSS_SCALE} is {numbers[:4]}, not a scale and three counts")
        self._state.copy_(row.flatten())
