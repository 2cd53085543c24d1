"""Mixed precision: a network computes in float32, or in a half type up to the last convolutions of the head.

Weights, batch statistics, the losses and the update are always float32, and those convolutions are too unless
RpnParam.head.fp32_predict is False.
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
INIT_SCALE = 2.0**16
MAX_SCALE = 2.0**24
GROWTH_INTERVAL = 2000  # steps without overflow, after which the scale is doubled
MAX_SKIPPED = 25  # consecutive steps; with more, the scale is not the cause


def requested_precision(general: General) -> Precision:
    """Return the compute dtype that General.bf16 and fp16 request; the device may not have it."""
    if general.bf16:
        return "bfloat16"
    return "float16" if general.fp16 else "float32"


def precision(general: General, device: torch.device) -> tuple[Precision, str]:
    """Return the compute dtype on a device for General.fp16 and bf16, and a line for the log.

    A CPU with bfloat16 in hardware computes in that for both; any other CPU in float32.
    """
    option = "bf16" if general.bf16 else "fp16"
    dtype = requested_precision(general)
    if device.type == "cuda":
        if dtype == "bfloat16" and torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            dtype, reason = "float16", f"General.bf16 is set; {name} has no bfloat16: "
        else:
            reason = ""
        float32 = "TF32" if uses_tf32(general, dtype) else "IEEE float32"
        if dtype == "float32":
            return dtype, f"computing in float32, convolutions in {float32}"
        return dtype, f"{reason}computing in {dtype}, float32 convolutions in {float32}"
    if dtype == "float32":
        return dtype, "computing in float32"
    if cpu_has_bfloat16():
        return "bfloat16", f"General.{option} is set: computing in bfloat16, this processor's half type"
    return "float32", f"General.{option} is set; this processor has no half type: computing in float32"


def uses_tf32(general: General, compute_dtype: Precision) -> bool:
    """Return True if float32 convolutions and matrix products on a GPU round their inputs to TF32 (10-bit mantissa).

    The default is True for a run in a half type, whose other convolutions are no more exact, and False in float32.
    """
    return general.tf32 if general.tf32 is not None else compute_dtype != "float32"


def configure_arithmetic(general: General, compute_dtype: Precision, device: torch.device) -> None:
    """Set torch's process-wide switches for arithmetic on a GPU: TF32, General.deterministic, and cuDNN's choice of
    algorithms by timing, which pays because input shapes are static, and may differ from run to run.

    Deterministic operators are used where torch has them; it warns about each one that it lacks.
    """
    if device.type != "cuda":
        return
    float32 = "tf32" if uses_tf32(general, compute_dtype) else "ieee"
    torch.backends.cudnn.conv.fp32_precision = float32  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = float32
    torch.backends.cudnn.deterministic = general.deterministic
    torch.backends.cudnn.benchmark = not general.deterministic
    if general.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is initialised, which is later
    torch.use_deterministic_algorithms(general.deterministic, warn_only=True)
    # filling detects reads of uninitialized memory; results do not depend on it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True if the processor multiplies in bfloat16 (AVX512-BF16 or AMX). Detected on Linux only."""
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
    skipped: int  # steps since the start of the run
    skipped_in_a_row: int
    growth_tracker: int  # steps without overflow since the scale last changed

    @property
    def is_lost(self) -> bool:
        """True if no scale helps: the cause is not the overflow of gradients."""
        return self.skipped_in_a_row >= MAX_SKIPPED


class LossScale:
    """Dynamic loss scale for float16, kept on the device: torch's GradScaler reads found_inf on the host at every step,
    which makes the host wait for the device.

    Here the device skips the update of a step with an overflow, and the host reads the state only to log it.

    The scale is halved when a gradient overflows, and doubled after GROWTH_INTERVAL steps without overflow.
    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2, with a dynamic factor.
    """

    def __init__(self, device: torch.device) -> None:
        self._state = torch.tensor([INIT_SCALE, 0, 0, 0], dtype=torch.float64, device=device)

    @property
    def value(self) -> Tensor:
        """The scale, () float32 on the device."""
        return self._state[0].float()

    def update(self, found_inf: Tensor) -> None:
        """Update the scale after a step. found_inf: bool () on the device, True if a gradient overflowed."""
        scale, skipped, in_a_row, tracker = self._state.unbind()
        zero = torch.zeros_like(scale)
        grows = tracker + 1 >= GROWTH_INTERVAL
        grown = scale.maximum((2 * scale).clamp(max=MAX_SCALE))
        after_overflow = torch.stack([scale / 2, skipped + 1, in_a_row + 1, zero])
        otherwise = [torch.where(grows, grown, scale), skipped, zero, torch.where(grows, zero, tracker + 1)]
        self._state.copy_(torch.where(found_inf, after_overflow, torch.stack(otherwise)))

    def read(self) -> LossScaleState:
        """Return the state; the host waits for the device."""
        value, *counts = self._state.tolist()
        return LossScaleState(value, *map(int, counts))

    def state_dict(self) -> dict[str, Tensor]:
        """Return one tensor (4,) float64, the fields of LossScaleState."""
        return {LOSS_SCALE: self._state.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state. One without a scale, from a run in another precision, is ignored.

        Raises ValueError for numbers that no run has; nothing is loaded.
        """
        row = state.get(LOSS_SCALE)
        if row is None:
            return
        numbers = row.double().flatten().tolist()
        whole = all(math.isfinite(number) and number >= 0 for number in numbers)
        if len(numbers) != 4 or not whole or numbers[0] == 0:
            raise ValueError(f"the checkpoint is damaged: {LOSS_SCALE} is {numbers[:4]}, not a scale and three counts")
        self._state.copy_(row.flatten())
