"""Training by MXNet on several devices and machines, for both of which CPUs of this machine are used."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("mxnet", reason="MXNet 1.9.1 is not in this environment: make mxnet-test runs these")

from config.load import load_config
from core.data.loader import make_train_loader
from core.engine import trainer as torch_engine
from core.engine_mxnet.trainer import build_trainer
from core.weights.checkpoint import load_weights
from tests.small_config import DEMO, SMALL_TRAINING
from tests.small_run import records
from utils.make_demo_dataset import make_demo_dataset

ROOT = Path(__file__).parents[2]
SMALL = [
    *SMALL_TRAINING,
    "General.batch_image=8",
    "General.log_frequency=1",
    "OptimizeParam.optimizer.lr=0.004",
    "OptimizeParam.schedule.end_epoch=1",
    "OptimizeParam.schedule.lr_epoch=()",
]
Trained = tuple[list[list[float]], Mapping[str, Tensor], Mapping[str, Tensor]]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate 9 images, each trained on twice: of 4 per step, the fifth step has 2."""
    root = tmp_path_factory.mktemp("data")
    make_demo_dataset(root / "demo", train=9, val=4, size=128, seed=3)
    return root


def train(data_root: Path, steps: int, *overrides: str, engine: str = "mxnet") -> Trained:
    """Return losses and gradient norms of the last steps of an epoch, weights and statistics, and momentum."""
    places = [f"DatasetParam.data_root={data_root}"]
    config = load_config(str(DEMO), is_train=True, overrides=[*SMALL, *places, *overrides])
    loader = make_train_loader(config, num_device=config.KvstoreParam.num_device)
    trainer: Any
    if engine == "mxnet":
        trainer, _ = build_trainer(config, loader.iter_per_epoch, None)
    else:
        trainer, _ = torch_engine.build_trainer(config, torch.device("cpu"), loader.iter_per_epoch, None)
    batches, first = list(iter_steps(loader)), loader.iter_per_epoch - steps
    values = [trainer.step(batches[step], step).values.tolist() for step in range(first, first + steps)]
    return values, trainer.weights(), trainer.state()


def iter_steps(loader: Any) -> Any:
    loader.end_step = loader.iter_per_epoch
    batches = iter(loader)
    for _ in range(loader.iter_per_epoch):
        yield [next(batches) for _ in range(loader.accumulate)]


def close(ours: Trained, theirs: Trained, rtol: float) -> None:
    np.testing.assert_allclose(ours[0], theirs[0], rtol=rtol)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            error = (mine[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert error <= rtol, (name, float(error))


TWO = ("General.batch_image=2", "KvstoreParam.processes=2")


@pytest.mark.parametrize("kvstore", ["local", "device"])
@pytest.mark.parametrize("sync_loss", [False, True])
def test_devices_train_as_one_that_accumulates_their_batches(data_root: Path, kvstore: str, sync_loss: bool) -> None:
    """Sums are equal to float32's last digits; the losses of each batch are divided by its own boxes."""
    common = (f"RpnParam.sync_loss={sync_loss}",)
    several = train(data_root, 3, *TWO, *common, f"KvstoreParam.kvstore={kvstore}")
    adding = train(data_root, 3, *common, "General.batch_image=2", "OptimizeParam.accumulate=2")
    close(several, adding, rtol=1e-5)
    both = train(
        data_root, 3, *common, "KvstoreParam.processes=2", "General.batch_image=1", "OptimizeParam.accumulate=2"
    )
    four = train(data_root, 3, *common, "KvstoreParam.processes=4", "General.batch_image=1")
    close(both, four, rtol=1e-5)


def test_steps_are_those_of_torch(data_root: Path) -> None:
    """This includes an epoch's last step, in which two devices of four have no image."""
    four = ("General.batch_image=1", "RpnParam.sync_loss=True")
    ours = train(data_root, 2, *four, "KvstoreParam.processes=4")
    theirs = train(data_root, 2, *four, "OptimizeParam.accumulate=4", engine="torch")
    close(ours, theirs, rtol=1e-3)
    assert sum("moving_var" in name for name in theirs[1]) > 20


def command(data_root: Path, folder: Path, name: str, *overrides: str) -> list[str]:
    """Return the user's command for a training by MXNet, without the interpreter."""
    places = [f"General.output_root={folder}", f"General.name={name}", f"DatasetParam.data_root={data_root}"]
    values = [*SMALL, *places, *overrides]
    arguments = ["--engine", "mxnet", "--gpus", "cpu", *[one for value in values for one in ("--set", value)]]
    return [str(ROOT / "detection_train.py"), "--config", str(DEMO), *arguments]


TORCHRUN = [
    *("-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"),
    *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
]
MACHINES = ("KvstoreParam.machines=2", "KvstoreParam.kvstore=dist_sync")


def start(arguments: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MXNET_")}
    environment |= {"NECKLACE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment | variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(arguments: list[str], folder: Path) -> str:
    process = start(arguments, folder)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, output
    return output


def test_machines_train_as_devices_of_one(data_root: Path, tmp_path: Path) -> None:
    """kvstore dist_sync has a scheduler and two servers, which end with the run."""
    common = ("General.loader_worker=1", "TestParam.eval_epoch=1")
    run(command(data_root, tmp_path, "devices", *TWO, *common), tmp_path)
    run([*TORCHRUN, *command(data_root, tmp_path, "machines", *MACHINES, *common, "General.batch_image=2")], tmp_path)
    log = (tmp_path / "machines" / "log.txt").read_text()
    assert "on cpu(0) on each of 2 machines, in float32, gradients summed by kvstore dist_sync" in log
    ours, theirs = ([line for line in records(tmp_path / name) if "lr" in line] for name in ("machines", "devices"))
    assert len(ours) == len(theirs) == 5
    assert [line["cls_loss"] for line in ours] == pytest.approx([line["cls_loss"] for line in theirs], rel=1e-5)
    ended = [load_weights(tmp_path / name / "checkpoint-0001.safetensors")[0] for name in ("machines", "devices")]
    for name, value in ended[1].items():
        torch.testing.assert_close(ended[0][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert not servers(tmp_path)


def servers(folder: Path) -> dict[int, int]:
    """Return the kvstore's schedulers and servers that `start` started for this folder: process to parent."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            is_ours = str(folder).encode() in (process / "environ").read_bytes()
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
        if b"core.engine_mxnet.server" in words and is_ours:
            found[int(process.name)] = parent
    return found


def until(condition: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_machines(data_root: Path, folder: Path, *values: tuple[str, ...]) -> list[subprocess.Popen[str]]:
    """Start a long training on two machines, with overrides each, without a launcher that would detect lost ones."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    variables["NECKLACE_TIMEOUT"] = "10"
    common = (*MACHINES, "General.batch_image=1", "OptimizeParam.schedule.end_epoch=50")
    return [
        start(command(data_root, folder, "run", *common, *own), folder, **variables, RANK=str(rank))
        for rank, own in enumerate(values or ((), ()))
    ]


def outputs(processes: list[subprocess.Popen[str]]) -> list[str]:
    try:
        return [process.communicate(timeout=40)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def is_training(folder: Path) -> bool:
    log = folder / "run" / "log.jsonl"
    return log.is_file() and len(log.read_text().splitlines()) > 3


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_is_lost_ends_the_others(data_root: Path, tmp_path: Path, lost: int) -> None:
    """They end at once, or after NECKLACE_TIMEOUT if they wait for its gradients. No server is left running."""
    processes = start_machines(data_root, tmp_path)
    until(lambda: is_training(tmp_path), 60)
    processes[lost].kill()
    output = outputs(processes)[1 - lost]
    assert processes[1 - lost].returncode == 75, output
    assert "rank 1 was last" in output or "another machine was lost" in output or "held them is gone" in output
    until(lambda: not servers(tmp_path), 5)


def test_a_server_that_stalls_ends_all(data_root: Path, tmp_path: Path) -> None:
    """MXNet itself would wait for it forever."""
    processes = start_machines(data_root, tmp_path)
    until(lambda: is_training(tmp_path), 60)
    stalled = next(server for server, parent in servers(tmp_path).items() if parent == processes[1].pid)
    os.kill(stalled, signal.SIGSTOP)
    until(lambda: all(process.poll() is not None for process in processes), 40)
    os.kill(stalled, signal.SIGKILL)  # its output is theirs
    shown = outputs(processes)
    assert [process.returncode for process in processes] == [75, 75]
    assert any("MXNet's kvstore waited for 10 s" in output for output in shown)


def test_machines_with_different_configs_are_an_error(data_root: Path, tmp_path: Path) -> None:
    """The error comes before MXNet starts, in which the machines would wait for each other."""
    processes = start_machines(data_root, tmp_path, ("KvstoreParam.processes=1",), ("KvstoreParam.processes=2",))
    for output in outputs(processes):
        assert "the processes differ in number of devices" in output
    assert [process.returncode for process in processes] == [1, 1]


def test_synced_statistics_are_those_of_all_devices(data_root: Path, tmp_path: Path) -> None:
    """Four devices with one image each equal one with all four, if the losses are synced too; also in the epoch's
    last step, in which two have none."""
    synced = ("NormalizeParam.type=syncbn", "RpnParam.sync_loss=True")
    four = ("General.batch_image=1", "KvstoreParam.processes=4")
    run(command(data_root, tmp_path, "four", *four, *synced), tmp_path)
    run(command(data_root, tmp_path, "one", *synced, "General.batch_image=4"), tmp_path)
    run(command(data_root, tmp_path, "own", *four, "RpnParam.sync_loss=True"), tmp_path)
    synced_run, one, own = (records(tmp_path / name) for name in ("four", "one", "own"))
    for key in ("reg_loss", "grad_norm"):
        ours, theirs = ([line[key] for line in lines] for lines in (synced_run, one))
        assert ours == pytest.approx(theirs, rel=1e-3), key
    assert len(one) == 5
    assert own[0]["grad_norm"] != pytest.approx(one[0]["grad_norm"], rel=1e-2)
