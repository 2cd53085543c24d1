"""MXNet's kvstore, which sums arrays over the devices of a machine and, as dist_sync, over machines.

dist_sync needs servers, which hold the sums, and a scheduler, by which all processes find each other: the process of
each machine starts a server, the main process also the scheduler (core.engine_mxnet.server).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any, Self

from core.distributed.process_group import RETRY, ProcessGroup, timeout
from operator_cxx.mxnet_ops import load_mxnet

Arrays = Mapping[str, Any]  # of one device: mx.nd.NDArray by name


class Kvstore:
    """Sums of arrays over `num_device` devices of each machine of `group`.

    kind: local sums on the CPU, device on the devices, dist_sync on the servers of all machines.
    """

    def __init__(self, kind: str, num_device: int, group: ProcessGroup) -> None:
        self.size = num_device * group.world_size
        self._group = group
        self._known: set[str] = set()
        self._held = ExitStack()
        self._store: Any = None
        if self.size == 1:
            return
        mx = load_mxnet()
        # also detects a lost process at once, where MXNet would wait
        group.require_equal({"number of devices (KvstoreParam)": num_device})
        if group.world_size > 1:
            _start_servers(group, self._held)
        with self._limited():
            self._store = mx.kv.create(kind)
        if group.world_size > 1:
            # a barrier at exit would hang if another process failed
            mx.base.check_call(mx.base._LIB.MXKVStoreSetBarrierBeforeExit(self._store.handle, 0))

    def all_reduce_sum_(self, devices: Sequence[Arrays]) -> None:
        """Replace the arrays of each name by their sum over all devices and machines.

        Raises LostProcessError if another machine's process has ended.
        """
        if self._store is None:
            return
        assert len(devices) * self._group.world_size == self.size
        self._group.any_rank(False)  # detects a lost process at once
        with self._limited():
            for name, first in devices[0].items():
                if name not in self._known:
                    self._known.add(name)
                    self._store.init(name, load_mxnet().nd.zeros(first.shape, dtype=first.dtype))
            for i, name in enumerate(devices[0]):
                arrays = [device[name] for device in devices]
                self._store.push(name, arrays, priority=-i)
                self._store.pull(name, out=arrays, priority=-i)
            load_mxnet().nd.waitall()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Exit from the process if the block waits longer than NECKLACE_TIMEOUT for other machines: MXNet would wait
        forever, and cannot be interrupted."""
        if self._group.world_size == 1:
            yield
            return
        seconds = timeout().total_seconds()
        timer = Timer(seconds, _exit_after_timeout, [self._group.rank, seconds])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop this machine's server; without an error, after all machines have finished with it."""
        if kind is None:
            self._group.any_rank(False)
        self._store = None
        self._held.close()


def _start_servers(group: ProcessGroup, held: ExitStack) -> None:
    """Set the environment variables by which the kvstore's processes find each other, and start those of this machine.

    They are stopped when `held` closes.
    """
    # resolved on another machine, since the first one may resolve its own name to 127.0.1.1
    root = group.broadcast(1, "address of the first machine", socket.gethostbyname(os.environ["MASTER_ADDR"]))
    with socket.socket() as probe:
        probe.bind(("", 0))  # a free port
        port = group.broadcast(0, "port of MXNet's scheduler", str(probe.getsockname()[1]))
    os.environ |= {
        "DMLC_PS_ROOT_URI": root,
        "DMLC_PS_ROOT_PORT": port,
        "DMLC_NODE_HOST": root if group.is_main_process else _address_towards(root),
        "DMLC_NUM_WORKER": str(group.world_size),
        "DMLC_NUM_SERVER": str(group.world_size),
        "DMLC_ROLE": "worker",
    }
    for role in ["scheduler", "server"] if group.is_main_process else ["server"]:
        process = subprocess.Popen(
            [sys.executable, "-m", "core.engine_mxnet.server", str(os.getpid())],
            env=os.environ | {"DMLC_ROLE": role},
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # Ctrl-C is sent to the training, which still needs these processes
        )
        held.callback(_stop, process)


def _exit_after_timeout(rank: int, seconds: float) -> None:
    print(
        f"rank {rank}: MXNet's kvstore waited for {seconds:.0f} s; another machine was lost",
        file=sys.stderr,
        flush=True,
    )
    os._exit(RETRY)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    process.kill()
    process.wait()


def _address_towards(host: str) -> str:
    """Return this machine's address on the network that leads to a host."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # a datagram socket: nothing is sent
        address: str = probe.getsockname()[0]
        return address
