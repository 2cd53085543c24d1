"""Choice of the device, transfers to it, and its peak memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from models.record import Batch

if TYPE_CHECKING:
    from config.schema import Config


def select_device(gpus: Sequence[int], local_rank: int = 0) -> torch.device:
    """Return the device of a process: entry `local_rank` of KvstoreParam.gpus, or the CPU if that is empty.

    Raises ValueError for GPUs that this machine does not have.
    """
    if not gpus:
        return torch.device("cpu")
    if local_rank >= len(gpus):
        raise ValueError(
            f"process {local_rank} of this machine has no GPU: the config names {','.join(map(str, gpus))}; start one "
            "process per GPU, or name more with --gpus"
        )
    missing = _missing_gpus(gpus)
    if missing is not None:
        problem, remedy = missing
        raise ValueError(f"{problem}: add {remedy}")
    return torch.device("cuda", gpus[local_rank])


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return the named device; None: the first GPU if there is one, else the CPU.

    Raises ValueError for a name that torch does not know and for a GPU that this machine does not have.
    """
    if device is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device}: this machine has {torch.cuda.device_count()} GPUs; write cpu, or another one"
        )
    return found


def require_gpus(config: Config) -> None:
    """Raise ValueError for a training on GPUs that this machine does not have; the message says what to run instead,
    with its global batch size and learning rate."""
    kvstore, optimize = config.KvstoreParam, config.OptimizeParam
    missing = _missing_gpus(kvstore.gpus)
    if missing is None:
        return
    problem, remedy = missing
    num_device = max(1, torch.cuda.device_count()) * kvstore.machines
    images = config.General.batch_image * num_device * optimize.accumulate
    by_rule = optimize.optimizer.lr_per_image * images
    message = (
        f"{problem}. Add {remedy}: the global batch size is then {images}, for which the linear rule gives the "
        f"learning rate {by_rule:g}"
    )
    if optimize.optimizer.lr != optimize.optimizer.lr_per_image * optimize.global_batch_size:
        message += f" (the config sets {optimize.optimizer.lr:g})"
    if optimize.global_batch_size > images and optimize.global_batch_size % images == 0:
        accumulate = optimize.accumulate * optimize.global_batch_size // images
        message += (
            f". Or add {remedy} --set OptimizeParam.accumulate={accumulate}: the config's global batch size of "
            f"{optimize.global_batch_size} and learning rate of {optimize.optimizer.lr:g}, by accumulating gradients"
        )
    raise ValueError(message)


def _missing_gpus(gpus: Sequence[int]) -> tuple[str, str] | None:
    """Return the problem and the option that solves it, if this machine does not have all of the GPUs."""
    available = torch.cuda.device_count()
    if not gpus or max(gpus) < available:
        return None
    present = ",".join(map(str, range(available))) or "cpu"
    return (
        f"the config asks for the GPUs {','.join(map(str, gpus))}; this machine has {available}",
        f"--gpus {present}",
    )


def available_gpus(gpus: Sequence[int]) -> tuple[int, ...]:
    """Return those of the config's GPUs that this machine has."""
    return tuple(gpu for gpu in gpus if gpu < torch.cuda.device_count())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on the device."""
    moved = {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in batch.items()}
    return cast(Batch, moved)


class BatchUpload:
    """Copies batches to the device. On a GPU a stream of its own copies, beside the steps that are still computed: the
    host, which is ahead of the device, does not wait, and what it launches later waits for the copy.

    streams: torch.cuda, or its like in a test.
    """

    def __init__(self, device: torch.device, streams: Any = torch.cuda) -> None:
        self._device = device
        self._streams = streams
        self._side = streams.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with its tensors on the device."""
        if self._side is None:
            return to_device(batch, self._device)
        with self._streams.stream(self._side):
            moved = to_device(batch, self._device)
        main = self._streams.current_stream(self._device)
        main.wait_stream(self._side)
        for value in moved.values():
            if isinstance(value, Tensor):
                value.record_stream(main)  # its memory is free for later copies once the main stream is done with it
        return moved


def move_module(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to the device, with convolution weights in channels_last, the fastest format on CPU and GPU."""
    module.to(device)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far, in bytes: the GPU's, or on the CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
