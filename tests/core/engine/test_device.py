"""Missing GPUs, copies to the device, and running out of memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from config.load import load_config
from core.data.loader import make_train_loader
from core.engine.device import BatchUpload, require_gpus
from core.engine.out_of_memory import explain_out_of_memory
from core.engine.trainer import build_trainer, transform_batches
from tests.core.conftest import Run
from tests.small_config import DEMO, SMALL_NETWORK
from tests.two_processes import run_in_processes

NASFPN = "config/NASFPN/retina_r50v1b_nasfpn_640_7@256_25epoch.py"


@pytest.mark.parametrize(
    "present, overrides, said",
    [
        (1, [], ["this machine has 1", "0: the global batch size is then 8", "rate 0.01", "accumulate=8", "of 0.08"]),
        (2, ["OptimizeParam.accumulate=2"], ["0,1: the global batch size is then 32", "accumulate=8", "of 128"]),
        (0, [], ["--gpus cpu: the global batch size is then 8"]),
        (4, ["OptimizeParam.optimizer.lr=0.05"], ["rate 0.04 (the config sets 0.05)", "accumulate=2"]),
    ],
)
def test_missing_gpus_are_an_error_with_what_to_run(
    monkeypatch: pytest.MonkeyPatch, present: int, overrides: list[str], said: list[str]
) -> None:
    config = load_config(NASFPN, is_train=True, overrides=["RpnParam.num_class=3", *overrides])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    with pytest.raises(ValueError, match="asks for the GPUs 0,1,2,3,4,5,6,7") as error:
        require_gpus(config)
    assert all(part in str(error.value) for part in said), str(error.value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    require_gpus(config)


def test_the_linear_rule_counts_what_is_accumulated() -> None:
    base = ["RpnParam.num_class=3", "KvstoreParam.gpus=0", "General.batch_image=4"]
    config = load_config(NASFPN, is_train=True, overrides=[*base, "OptimizeParam.accumulate=6"])
    assert config.OptimizeParam.global_batch_size == 24
    assert config.OptimizeParam.optimizer.lr == pytest.approx(24 * 0.01 / 8)


class FakeStreams:
    """Stands in for torch.cuda: records the order of calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.now = "main"

    def Stream(self, device: torch.device) -> str:
        return f"side of {device}"

    @contextmanager
    def stream(self, side: str) -> Iterator[None]:
        self.now = side
        yield
        self.now = "main"

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(
            name=self.now, wait_stream=lambda other: self.calls.append(f"{self.now} waits for {other}")
        )


def test_a_batch_is_copied_aside_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, gpu = FakeStreams(), torch.device("cuda", 1)

    def to_device(batch: Any, device: torch.device) -> Any:
        fake.calls.append(f"copy to {device} on {fake.now}")
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    monkeypatch.setattr("core.engine.device.to_device", to_device)
    used = lambda value, stream: fake.calls.append(f"{tuple(value.shape)} is used on {stream.name}")  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", used)
    batch: Any = {"image": torch.zeros(2, 3), "im_id": torch.zeros(2), "files": ["a", "b"]}
    moved = BatchUpload(gpu, fake)(batch)
    assert moved.keys() == batch.keys()
    assert fake.calls == [
        "copy to cuda:1 on side of cuda:1",
        "main waits for side of cuda:1",
        "(2, 3) is used on main",
        "(2,) is used on main",
    ]


def test_on_a_cpu_a_batch_stays_as_it_is() -> None:
    fake, image = FakeStreams(), torch.zeros(2, 3)
    batch: Any = {"image": image, "files": ["a"]}
    assert BatchUpload(torch.device("cpu"), fake)(batch)["image"] is image
    assert fake.calls == []


def test_the_network_reads_channels_last_images_and_weights(load: Run) -> None:
    config = load()
    trainer, _ = build_trainer(config, torch.device("cpu"), 5, None)
    batch = next(iter(make_train_loader(config)))
    transform_batches(config, [batch])
    assert batch["data"].is_contiguous(memory_format=torch.channels_last)
    weights = [p for p in trainer.module.parameters() if p.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert len(weights) > 20


def step_with_little_memory(_: int, overrides: list[str]) -> str:
    """Return the error of a step on images of 1024 x 1024 in a process limited to 300 MB more than it has."""
    config = load_config(str(DEMO), is_train=True, overrides=overrides)
    trainer, _ = build_trainer(config, torch.device("cpu"), 5, None)
    batch = next(iter(make_train_loader(config)))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 300 * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        with explain_out_of_memory(config, torch.device("cpu"), "step 7"):
            trainer.step([batch], 7)
    except MemoryError as error:
        return str(error)
    return "the memory sufficed"


def test_running_out_of_memory_is_explained(load: Run) -> None:
    sides = ["ResizeParam.short=1024", "ResizeParam.long=1024"]
    base = [*SMALL_NETWORK, f"DatasetParam.data_root={load().DatasetParam.data_root}", *sides]
    (message,) = run_in_processes(step_with_little_memory, [*base, "General.batch_image=6"], size=1)
    for part in (
        "out of memory at step 7 on the CPU: it requested ",
        "A step of 6 images of 1024 x 1024 needs at least ",
        "--set General.batch_image=3 --set OptimizeParam.accumulate=2",
        "--set ModelParam.memonger=True",
        "--set ResizeParam.short=896 --set ResizeParam.long=896",
    ):
        assert part in message, message


@pytest.mark.parametrize("batch, smaller", [(5, "--set TestParam.batch_image=2"), (1, "a batch is one image already")])
def test_a_test_that_does_not_fit_has_other_options(load: Run, batch: int, smaller: str) -> None:
    config = load(f"TestParam.batch_image={batch}", "ResizeParam.short=256", "ResizeParam.long=256")
    with (
        pytest.raises(MemoryError) as error,
        explain_out_of_memory(config, torch.device("cpu"), "the evaluation after epoch 3", is_test=True),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    message = str(error.value)
    for part in ("the evaluation after epoch 3", f"{batch} images of 256 x 256", smaller, "ResizeParam.short=128"):
        assert part in message, message
    assert not any(part in message for part in ("accumulate", "memonger", "General.batch_image")), message


def test_other_errors_stay_what_they_are(load: Run) -> None:
    config: Any = load()
    with (
        pytest.raises(RuntimeError, match="shapes") as error,
        explain_out_of_memory(config, torch.device("cpu"), "step 0"),
    ):
        raise RuntimeError("shapes differ")
    assert not isinstance(error.value, MemoryError)
    with (
        pytest.raises(MemoryError, match=r"requested 20.00 MiB more"),
        explain_out_of_memory(config, torch.device("cpu"), "step 0"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity")
