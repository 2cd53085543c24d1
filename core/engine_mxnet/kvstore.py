"""MXNet's kvstore, which adds arrays up over the devices of a machine and, as dist_sync, over machines.

dist_sync wants servers, which hold the sums, and a scheduler, which introduces everybody: the process of every machine
starts a server, the first one the scheduler too (core.engine_mxnet.server).
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
    """Sums of arrays over `num_device` devices of every machine of `group`.

    kind: local adds up on the CPU, device on the devices, dist_sync does so over all machines' servers.
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
        # and finds out at once who is lost: MXNet would wait
        group.require_equal({"number of devices (KvstoreParam)": num_device})
        if group.world_size > 1:
            _start_servers(group, self._held)
        with self._limited():
            self._store = mx.kv.create(kind)
        if group.world_size > 1:
            # waiting for all at its end would hang where one of them failed
            mx.base.check_call(mx.base._LIB.MXKVStoreSetBarrierBeforeExit(self._store.handle, 0))

    def add_up(self, devices: Sequence[Arrays]) -> None:
        """Replace arrays, those of one name on all devices and machines, by their sum.

        Raises LostProcessError where another machine's process has ended.
        """
        if self._store is None:
            return
        assert len(devices) * self._group.world_size == self.size
        self._group.any_rank(False)  # finds out at once who is lost
        with self._limited():
            for name, first in devices[0].items():
                if name not in self._known:
                    self._known.add(name)
                    self._store.init(name, load_mxnet().nd.zeros(first.shape, dtype=first.dtype))
            for place, name in enumerate(devices[0]):
                arrays = [device[name] for device in devices]
                self._store.push(name, arrays, priority=-place)
                self._store.pull(name, out=arrays, priority=-place)
            load_mxnet().nd.waitall()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Ends the process where what is inside waits longer than NECKLACE_TIMEOUT for other machines: MXNet would wait
        for ever, and cannot be interrupted."""
        if self._group.world_size == 1:
            yield
            return
        seconds = timeout().total_seconds()
        timer = Timer(seconds, _give_up, [self._group.rank, seconds])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends this machine's server; without an error, when all machines are through with it."""
        if kind is None:
            self._group.any_rank(False)
        self._store = None
        self._held.close()


def _start_servers(group: ProcessGroup, held: ExitStack) -> None:
    """The environment by which MXNet finds its kvstore's processes, and those of this machine, until `held` closes."""
    # as another machine knows the first one, which may take its own name for 127.0.1.1
    root = group.broadcast(1, "address of the first machine", socket.gethostbyname(os.environ["MASTER_ADDR"]))
    port = group.broadcast(0, "port of MXNet's scheduler", str(_free_port()))
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
            start_new_session=True,  # Ctrl-C is for the training, which still needs them
        )
        held.callback(_end, process)


def _give_up(rank: int, seconds: float) -> None:
    print(
        f"rank {rank}: MXNet's kvstore waited for {seconds:.0f} s; another machine was lost",
        file=sys.stderr,
        flush=True,
    )
    os._exit(RETRY)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    process.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _address_towards(host: str) -> str:
    """This machine's address on the network that leads to a host."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # of a datagram: nothing is sent
        address: str = probe.getsockname()[0]
        return address
