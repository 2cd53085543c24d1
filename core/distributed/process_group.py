"""The processes that train together: torch's process group, and what a run asks of it.

A process alone is a world of its own: it has no group, and everything here answers at once.
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
RETRY = 75  # the exit status (EX_TEMPFAIL) of a process that lost the others, or waited for them in vain


class LostProcessError(RuntimeError):
    """Another process died, or let this one wait for too long."""


def launched_size() -> int | None:
    """How many processes a launcher (core.distributed.launch, or torchrun) started together; None without one."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Does this process write the files and the log?"""
        return self.rank == 0

    def doing(self, what: str) -> None:
        """Leave word of what this process is about to do, for the error of a process that waits for it."""
        if self.size > 1:
            _store().set(f"doing/{self.rank}", what)

    def tell(self, line: str) -> None:
        """Leave a line for the first process's log."""
        number = _store().add("told", 1)
        _store().set(f"told/{number}", line)

    def told(self) -> list[str]:
        """The lines that were left since the last call; the first process asks."""
        if self.size == 1:
            return []
        first, last = _store().add("heard", 0), _store().add("told", 0)
        _store().add("heard", last - first)
        return [_store().get(f"told/{number}").decode() for number in range(first + 1, last + 1)]

    def of(self, rank: int, name: str, value: str) -> str:
        """What process `rank` gives under a name that is used once."""
        if self.rank == rank:
            _store().set(f"of/{name}", value)
        return _store().get(f"of/{name}").decode()

    def any(self, wish: bool) -> bool:
        """Does any process wish it? All wait here for all."""
        if self.size == 1:
            return wish
        flag = torch.tensor(float(wish))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=_control_group())
        return bool(flag)

    def require_equal(self, values: Mapping[str, float]) -> None:
        """Raise ValueError where processes differ in one of the values, all under the same names."""
        if self.size == 1:
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

    def mean_(self, tensors: Sequence[Tensor], of_cpu: bool = False) -> None:
        """Replace the tensors, of one type, by their means over the processes: on the training device, or `of_cpu`."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=_control_group() if of_cpu else None)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def whereabouts(self) -> list[str]:
        """What every process said that it was doing."""
        lines = []
        try:
            for rank in range(self.size):
                key = f"doing/{rank}"
                known = _store().check([key])
                lines.append(f"rank {rank} was last: {_store().get(key).decode() if known else 'starting'}")
        except dist.DistError:  # the store went with the process that held it
            lines.append("what the others were doing is not known: the process that held the notes is gone")
        return lines


ALONE = World()


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """The world that a launcher's environment variables describe, joined for the length of the context.

    A process that does not come within NECKLACE_TIMEOUT seconds (600) is given up by the others: communication that
    fails inside raises LostProcessError, which says what every process was doing.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = launched_size()
    if size is None or size == 1:
        yield ALONE
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
    world = World(dist.get_rank(), dist.get_world_size())
    try:
        yield world
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        raise LostProcessError(f"rank {world.rank}: {error}\n" + "\n".join(world.whereabouts())) from error
    # Not after an error: taking the group down may wait for the others, and the process ends anyway.
    _groups.clear()
    dist.destroy_process_group()


def _is_of_communication(error: RuntimeError) -> bool:
    """Did another process break it off? gloo's errors are of no type of their own."""
    return isinstance(error, dist.DistError) or re.search(r"gloo|nccl|process ?group", str(error), re.I) is not None


_groups: dict[str, dist.ProcessGroup] = {}


def _control_group() -> dist.ProcessGroup | None:
    """A group for numbers of the CPU: the default one, where that is gloo's."""
    if dist.get_backend() == "gloo":
        return None
    if "control" not in _groups:
        _groups["control"] = dist.new_group(backend="gloo", timeout=timeout())
    return _groups["control"]


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def timeout() -> timedelta:
    """How long a process waits for another. Raises ValueError for a NECKLACE_TIMEOUT that is no number of seconds."""
    text = os.environ.get(TIMEOUT_VARIABLE, "600")
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{TIMEOUT_VARIABLE}: expected seconds, got {text!r}")
    return timedelta(seconds=int(text))
