"""The process group: a thin layer over torch.distributed with the collectives that a run needs.

A single process has no group: every collective returns at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_VARIABLE = "NECKLACE_TIMEOUT"
RETRY = 75  # the exit status (EX_TEMPFAIL) of a process that lost the others, or timed out waiting for them


class LostProcessError(RuntimeError):
    """Another process died, or did not answer in time."""


def launched_size() -> int | None:
    """Return how many processes a launcher (core.distributed.launch, or torchrun) started; None without one."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """True for the rank that writes the files and the log."""
        return self.rank == 0

    def set_status(self, status: str) -> None:
        """Record what this process is about to do, for the error of a process that waits for it."""
        if self.world_size > 1:
            _store().set(f"status/{self.rank}", status)

    def statuses(self) -> list[str]:
        """Return the last status of every rank, a line each."""
        lines = []
        try:
            for rank in range(self.world_size):
                key = f"status/{rank}"
                known = _store().check([key])
                lines.append(f"rank {rank} was last: {_store().get(key).decode() if known else 'starting'}")
        except dist.DistError:  # the store went with the process that held it
            lines.append("the status of the other ranks is unknown: the process that held them is gone")
        return lines

    def send_message(self, line: str) -> None:
        """Send a line to the main process's log."""
        number = _store().add("sent", 1)
        _store().set(f"message/{number}", line)

    def receive_messages(self) -> list[str]:
        """Return the lines sent since the last call; only the main process calls it."""
        if self.world_size == 1:
            return []
        first, last = _store().add("received", 0), _store().add("sent", 0)
        _store().add("received", last - first)
        return [_store().get(f"message/{number}").decode() for number in range(first + 1, last + 1)]

    def broadcast(self, source: int, name: str, value: str) -> str:
        """Return the value that rank `source` passes, on every rank; each name is used once."""
        if self.rank == source:
            _store().set(f"broadcast/{name}", value)
        return _store().get(f"broadcast/{name}").decode()

    def any_rank(self, flag: bool) -> bool:
        """Return True on every rank if `flag` is True on any rank (all-reduce MAX)."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(float(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=_control_group())
        return bool(value)

    def require_equal(self, values: Mapping[str, float]) -> None:
        """Raise ValueError where ranks differ in one of the values; all pass the same names."""
        if self.world_size == 1:
            return
        own = torch.tensor(list(values.values()), dtype=torch.float64)
        bounds = torch.stack([own, -own])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=_control_group())
        differ = [name for name, most, least in zip(values, *bounds.tolist(), strict=True) if most != -least]
        if differ:
            raise ValueError(
                f"the processes differ in {', '.join(differ)}: give all machines the same files, and an output folder "
                "that they share (General.output_root)"
            )

    def all_reduce_mean_(self, tensors: Sequence[Tensor], on_cpu: bool = False) -> None:
        """Replace the tensors, of one dtype, by their means over the ranks: on the training device, or `on_cpu`."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=_control_group() if on_cpu else None)
        flat /= self.world_size
        means = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_([*tensors], [mean.view_as(tensor) for tensor, mean in zip(tensors, means, strict=True)])


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def join(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the process group that a launcher's environment variables describe, for the length of the context.

    A process that does not answer within NECKLACE_TIMEOUT seconds (600) counts as lost: communication that fails
    inside raises LostProcessError with the status of every rank.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = launched_size()
    if size is None or size == 1:
        yield SINGLE_PROCESS
        return
    limit = timeout()
    try:
        dist.init_process_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=limit)
        _control_group()
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        raise LostProcessError(
            f"{size} processes did not come together within {limit.seconds} s ({TIMEOUT_VARIABLE}): {error}"
        ) from error
    group = ProcessGroup(dist.get_rank(), dist.get_world_size())
    try:
        yield group
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        raise LostProcessError(f"rank {group.rank}: {error}\n" + "\n".join(group.statuses())) from error
    # not after an error: destroying the group may wait for the others, and the process exits anyway
    _groups.clear()
    dist.destroy_process_group()


def _is_of_communication(error: RuntimeError) -> bool:
    """Return True if another process caused the error. gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or re.search(r"gloo|nccl|process ?group", str(error), re.I) is not None


_groups: dict[str, dist.ProcessGroup] = {}


def _control_group() -> dist.ProcessGroup | None:
    """Return a group for numbers on the CPU: the default one, where that is gloo's."""
    if dist.get_backend() == "gloo":
        return None
    if "control" not in _groups:
        _groups["control"] = dist.new_group(backend="gloo", timeout=timeout())
    return _groups["control"]


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def timeout() -> timedelta:
    """Return how long a process waits for another. Raises ValueError for a NECKLACE_TIMEOUT that is no number."""
    text = os.environ.get(TIMEOUT_VARIABLE, "600")
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{TIMEOUT_VARIABLE}: expected seconds, got {text!r}")
    return timedelta(seconds=int(text))
