"""The device that a run computes on, and its memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from models.record import Batch

if TYPE_CHECKING:
    from config.schema import Config


def select_device(gpus: Sequence[int], local_rank: int = 0) -> torch.device:
    """The device of a process: of KvstoreParam.gpus that of its number on this machine; the CPU where there are none.

    Raises ValueError for GPUs that this machine does not have.
    """
    if not gpus:
        return torch.device("cpu")
    if local_rank >= len(gpus):
        raise ValueError(
            f"process {local_rank} of this machine has no GPU: the config names {','.join(map(str, gpus))}; start one "
            "process for each, or name more with --gpus"
        )
    lacking = _lacking(gpus)
    if lacking is not None:
        problem, remedy = lacking
        raise ValueError(f"{problem}: add {remedy}")
    return torch.device("cuda", gpus[local_rank])


def require_gpus(config: Config) -> None:
    """Raises ValueError for a training on GPUs that this machine does not have: what to run instead, and what becomes
    of the images per update and of the learning rate."""
    kvstore, optimize = config.KvstoreParam, config.OptimizeParam
    lacking = _lacking(kvstore.gpus)
    if lacking is None:
        return
    problem, remedy = lacking
    step_image = config.General.batch_image * max(1, torch.cuda.device_count()) * kvstore.machines * optimize.accumulate
    by_rule = optimize.optimizer.lr_per_image * step_image
    message = (
        f"{problem}. Add {remedy}: an update is of {step_image} images then, for which the linear rule gives the "
        f"learning rate {by_rule:g}"
    )
    if optimize.optimizer.lr != optimize.optimizer.lr_per_image * optimize.step_image:
        message += f" (the config sets {optimize.optimizer.lr:g})"
    if optimize.step_image > step_image and optimize.step_image % step_image == 0:
        accumulate = optimize.accumulate * optimize.step_image // step_image
        message += (
            f". Or add {remedy} --set OptimizeParam.accumulate={accumulate}: updates of {optimize.step_image} "
            f"images at the learning rate {optimize.optimizer.lr:g}, as the config has them, one after another"
        )
    raise ValueError(message)


def _lacking(gpus: Sequence[int]) -> tuple[str, str] | None:
    """What is wrong with GPUs that this machine does not have, and the option that mends it."""
    available = torch.cuda.device_count()
    if not gpus or max(gpus) < available:
        return None
    present = ",".join(map(str, range(available))) or "cpu"
    return (
        f"the config asks for the GPUs {','.join(map(str, gpus))}; this machine has {available}",
        f"--gpus {present}",
    )


def usable(gpus: Sequence[int]) -> tuple[int, ...]:
    """Those of the config's GPUs that this machine has."""
    return tuple(gpu for gpu in gpus if gpu < torch.cuda.device_count())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on the device."""
    moved = {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in batch.items()}
    return cast(Batch, moved)


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on the device, its convolution weights channels-last: convolutions of both devices are fastest so."""
    module.to(device)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: the GPU's, or on the CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
