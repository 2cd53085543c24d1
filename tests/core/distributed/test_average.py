"""Gradients, statistics and messages across processes: training equals that of one process on all images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from config.load import load_config
from config.schema import Config
from core.data.loader import make_train_loader
from core.distributed.gradient_average import GradientAverage
from core.distributed.process_group import SINGLE_PROCESS, LostProcessError, ProcessGroup, join
from core.engine.trainer import build_trainer
from tests.small_config import DEMO, SMALL_NETWORK
from tests.two_processes import run_in_processes
from utils.make_demo_dataset import make_demo_dataset

SMALL = [
    *SMALL_NETWORK,
    "OptimizeParam.optimizer.lr=0.01",
    "OptimizeParam.warmup.epoch=0.5",
]


def train(rank: int, size: int, steps: int, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Return the state after some steps in float64, which hides the order of sums: with few values per channel, BN
    amplifies float32's rounding errors."""
    config: Config = load_config(str(DEMO), is_train=True, overrides=overrides)
    group = ProcessGroup(rank, size) if size > 1 else SINGLE_PROCESS
    loader = make_train_loader(config, rank=rank, world_size=size)
    loader.end_step = steps
    trainer, _ = build_trainer(config, torch.device("cpu"), loader.iter_per_epoch, None, group)
    trainer.module.double().register_forward_pre_hook(_widen, with_kwargs=True)
    buffers = trainer.optimizer._momentum_buffers
    buffers.update({name: buffer.double() for name, buffer in buffers.items()})
    batches = iter(loader)
    for step in range(steps):
        trainer.step([next(batches) for _ in range(loader.accumulate)], step)
    return {name: value.clone() for name, value in trainer.module.state_dict().items()}


def _widen(_: torch.nn.Module, positional: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    return positional, inputs | {"data": inputs["data"].double()}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides for 9 images twice, 4 per step: every fifth step has 2, so that 2 of 4 processes have none."""
    root = tmp_path_factory.mktemp("data")
    make_demo_dataset(root / "demo", train=9, val=4, size=128, seed=3)
    return [*SMALL, f"DatasetParam.data_root={root}", "NormalizeParam.type=syncbn", "RpnParam.sync_loss=True"]


@pytest.mark.parametrize("size, steps", [(2, 20), (4, 6)])
def test_processes_train_as_one_with_all_their_images(overrides: list[str], size: int, steps: int) -> None:
    one = train(0, 1, steps, [*overrides, "General.batch_image=4"])
    several = [*overrides, f"General.batch_image={4 // size}", f"KvstoreParam.processes={size}"]
    states = run_in_processes(train, size, steps, several, size=size)
    for state in states:
        assert state.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(
                state[name], value, rtol=1e-5, atol=1e-7, msg=lambda t, name=name: f"{name}: {t}"
            )


@pytest.mark.parametrize("size, accumulate, sync_loss", [(1, 4, True), (2, 2, True), (1, 4, False)])
def test_batches_that_a_process_adds_up_are_as_many_processes(
    overrides: list[str], size: int, accumulate: int, sync_loss: bool
) -> None:
    common = [*overrides, "NormalizeParam.type=localbn", f"RpnParam.sync_loss={sync_loss}", "General.batch_image=1"]
    four = run_in_processes(train, 4, 6, [*common, "KvstoreParam.processes=4"], size=4)
    adding = [*common, f"KvstoreParam.processes={size}", f"OptimizeParam.accumulate={accumulate}"]
    for state in run_in_processes(train, size, 6, adding, size=size):
        for name, value in four[0].items():
            torch.testing.assert_close(
                state[name], value, rtol=1e-7, atol=1e-9, msg=lambda t, name=name: f"{name}: {t}"
            )


def averaged(rank: int, bucket_bytes: int) -> list[torch.Tensor]:
    """Return the gradients of three parameters after two passes; the second is unused, the first pass not averaged."""
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (3, 2, 4)]
    average = GradientAverage(parameters, ProcessGroup(rank, dist.get_world_size()), bucket_bytes)
    (100 * parameters[0]).sum().backward()
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == [100.0] * 3
    parameters[0].grad = None
    average.start()
    ((rank + 1) * parameters[0].sum() + 10 * (rank + 1) * parameters[2].sum()).backward()
    average.finish()
    return [p.grad for p in parameters if p.grad is not None]


@pytest.mark.parametrize("bucket_bytes", [1, 20, 10**6])
def test_gradients_are_averaged_whatever_the_buckets(bucket_bytes: int) -> None:
    for gradients in run_in_processes(averaged, bucket_bytes, size=3):
        assert [g.tolist() for g in gradients] == [[2.0] * 3, [0.0] * 2, [20.0] * 4]


def agreed(rank: int) -> tuple[bool, bool, list[float]]:
    group = ProcessGroup(rank, dist.get_world_size())
    mean = [torch.full((2,), float(rank)), torch.full((1, 1), 10.0 * rank)]
    group.all_reduce_mean_(mean)
    return (
        group.any_rank(rank == 1),
        group.any_rank(False),
        [value for part in mean for value in part.flatten().tolist()],
    )


def test_collectives() -> None:
    assert run_in_processes(agreed) == [(True, False, [0.5, 0.5, 5.0])] * 2
    assert (SINGLE_PROCESS.any_rank(True), SINGLE_PROCESS.any_rank(False)) == (True, False)


def heard(rank: int) -> list[list[str]]:
    group = ProcessGroup(rank, dist.get_world_size())
    rounds = []
    for number in range(2):
        for line in range(rank * (2 - number)):
            group.send_message(f"rank {rank} round {number} line {line}")
        group.any_rank(False)  # all have sent their lines
        rounds.append(sorted(group.receive_messages()) if group.is_main_process else [])
        group.any_rank(False)
    return rounds


def test_the_main_process_receives_every_message_once() -> None:
    first, *others = run_in_processes(heard, size=3)
    sent = [f"rank {rank} round 0 line {line}" for rank in (1, 2) for line in range(2 * rank)]
    assert first == [sent, ["rank 1 round 1 line 0", "rank 2 round 1 line 0", "rank 2 round 1 line 1"]]
    assert others == [[[], []]] * 2


def test_processes_that_do_not_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "NECKLACE_TIMEOUT": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(LostProcessError, match="2 processes did not come together within 2 s"),
        join(torch.device("cpu")),
    ):
        pass
