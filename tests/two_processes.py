"""Helper that runs a function in several processes, which form torch's default group over gloo on this machine."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A fork of a process that has run a backward pass cannot run one itself, and a fresh Python takes seconds to import
# torch: these are forks of a process that has imported the slow modules and done nothing else.
_context = get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "pytest"])


def run_in_processes(function: Callable[..., Any], *arguments: Any, size: int = 2, timeout: float = 300) -> list[Any]:
    """What `function(rank, *arguments)` returned in each process of a group, by rank.

    The function must be one of a module, and arguments and results ones that pickle takes; tensors of a CPU are. Each
    process computes with as many threads as this one. One that fails, dies or takes longer than `timeout` seconds is an
    AssertionError with its rank and traceback. No process is left behind.
    """
    environment = dict(os.environ)  # as it is now: the process that is forked from keeps that of its start
    task = (function, arguments, torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            _context.Process(target=_child, args=(pipe, environment, task, folder, rank, size, timeout), daemon=True)
            for rank, (_, pipe) in enumerate(pipes)
        ]
        try:
            for process, (_, pipe) in zip(processes, pipes, strict=True):
                process.start()
                pipe.close()  # the child's end: reading from the other end then stops when the child exits
            return _collect([pipe for pipe, _ in pipes], time.monotonic() + timeout)
        finally:
            for process, (pipe, _) in zip(processes, pipes, strict=True):
                pipe.close()
                if process.pid is not None:
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    """Return the results by rank, as soon as all are received or one process has failed."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(waiting, deadline - time.monotonic())
        assert ready, f"ranks {sorted(waiting.values())} did not end in time"
        for pipe in ready:
            rank = waiting[pipe]
            try:
                result, error = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert error is None, f"rank {rank} of {len(pipes)}:\n{error}"
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _child(
    pipe: Connection,
    environment: dict[str, str],
    task: tuple[Callable[..., Any], tuple[Any, ...], int],
    folder: str,
    rank: int,
    size: int,
    timeout: float,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function, arguments, threads = task
    torch.set_num_threads(threads)  # the number decides how sums are rounded
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not resolve
    result, error = None, None
    try:
        store = (Path(folder) / "store").as_uri()
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        result = function(rank, *arguments)
        dist.barrier()  # a process that exits early would break the connections of the others
        dist.destroy_process_group()
    except Exception:
        error = traceback.format_exc()
    pipe.send_bytes(pickle.dumps((result, error)))
    pipe.close()
