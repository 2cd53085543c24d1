"""Launching of one process per GPU of the config from a single command, by torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from core.distributed.process_group import RETRY
from operator_cxx.build import usable_cpus

MAX_RESTARTS = 3


def launch(script: str, arguments: Sequence[str], num_process: int, again: Sequence[str] = ()) -> int:
    """Run a script in `num_process` processes of this machine and return the exit status.

    If one is killed or stalls, all are stopped and restarted with the additional arguments `again`, up to MAX_RESTARTS
    times. An error that the script itself reports is final.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds to finish a step and write a checkpoint
    # processes share the cores, where OpenMP would give all of them to each process
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // num_process)))
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its report of a failure is too long
    for attempt in range(MAX_RESTARTS + 1):
        added = [argument for argument in again if attempt and argument not in arguments]
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_process,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        )
        try:
            elastic_launch(config, sys.executable)("-u", script, *arguments, *added)
            return 0
        except SignalException as error:
            return 128 + error.sigval
        except ChildFailedError as error:
            status = {rank: failure.exitcode for rank, failure in error.failures.items()}
        reported = [code for code in status.values() if code > 0 and code != RETRY]
        if reported:
            return reported[0]
        # the launcher itself ends the others with SIGTERM
        first = {rank: code for rank, code in status.items() if code != -signal.SIGTERM} or status
        causes = [
            f"rank {rank} was killed by signal {-code}" if code < 0 else f"rank {rank} lost the other processes"
            for rank, code in sorted(first.items())
        ]
        restart = "restarting all from the newest checkpoint" if again else "restarting all"
        print(f"{', '.join(causes)}; {restart if attempt < MAX_RESTARTS else 'giving up'}", file=sys.stderr)
    return 1


def torchrun(machines: int, num_process: int) -> str:
    """Return the command that starts `num_process` processes on each of several machines."""
    return f"torchrun --nnodes {machines} --nproc-per-node {num_process} --rdzv-backend c10d --rdzv-endpoint HOST"
