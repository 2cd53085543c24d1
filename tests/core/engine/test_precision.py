"""Half precision, on the CPU's slow float16: the operators that compute in it, and overflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from config.schema import Config, General
from core.data.loader import make_train_loader
from core.engine import precision
from core.engine.precision import MAX_SKIPPED, LossScale, LossScaleState, Precision, cpu_has_bfloat16
from core.engine.trainer import Trainer, build_trainer
from core.weights.checkpoint import latest
from models.record import Batch
from tests.core.conftest import Run
from tests.small_run import records, stop_at

CPU = torch.device("cpu")


@pytest.fixture
def compute_dtype(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let this CPU compute in the type, as a GPU would."""

    def choose(dtype: str) -> None:
        monkeypatch.setattr("core.engine.trainer.precision", lambda *_: (dtype, f"computing in {dtype}"))

    return choose


def make_trainer(config: Config) -> tuple[Trainer, list[Batch]]:
    loader = make_train_loader(config)
    loader.end_step = 4
    return build_trainer(config, CPU, loader.iter_per_epoch, None)[0], list(loader)


@pytest.mark.parametrize(
    "flags, dtype, said",
    [
        ("fpu avx512f avx512_bf16", "bfloat16", "General.{asked} is set: computing in bfloat16"),
        ("fpu amx_bf16 amx_tile", "bfloat16", "General.{asked} is set: computing in bfloat16"),
        ("fpu avx2 avx512f", "float32", "General.{asked} is set; this processor has no half type"),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_its_processor_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, dtype: str, said: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\nbugs : none\n")
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: cpu_has_bfloat16(cpuinfo))
    for asked, general in (("fp16", General(fp16=True)), ("bf16", General(fp16=False, bf16=True))):
        found, line = precision.precision(general, CPU)
        assert (found, line.startswith(said.format(asked=asked))) == (dtype, True)
    assert precision.precision(General(fp16=False), CPU) == ("float32", "computing in float32")
    assert not cpu_has_bfloat16(tmp_path / "none")


def test_a_gpu_computes_in_the_requested_type(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert precision.precision(General(fp16=True, tf32=False), gpu) == (
        "float16",
        "computing in float16, float32 convolutions in IEEE float32",
    )
    assert precision.precision(General(fp16=True, bf16=True), gpu) == (
        "bfloat16",
        "computing in bfloat16, float32 convolutions in TF32",
    )
    assert precision.precision(General(fp16=False), gpu)[1] == "computing in float32, convolutions in IEEE float32"
    assert precision.precision(General(fp16=False, tf32=True), gpu)[1] == "computing in float32, convolutions in TF32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    assert precision.precision(General(bf16=True), gpu) == (
        "float16",
        "General.bf16 is set; an old GPU has no bfloat16: computing in float16, float32 convolutions in TF32",
    )


@pytest.fixture
def switches() -> Iterator[None]:
    """Restore torch's process-wide switches after the test."""
    conv, matmul, cudnn = torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.cudnn
    before = conv.fp32_precision, matmul.fp32_precision, cudnn.deterministic, cudnn.benchmark
    yield
    conv.fp32_precision, matmul.fp32_precision, cudnn.deterministic, cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "general, compute_dtype, float32",
    [
        (General(fp16=False), "float32", "ieee"),  # for parity
        (General(fp16=False, tf32=True), "float32", "tf32"),
        (General(), "float16", "tf32"),
        (General(tf32=False, deterministic=True), "float16", "ieee"),
    ],
)
def test_arithmetic_on_a_gpu(switches: None, general: General, compute_dtype: Precision, float32: str) -> None:
    precision.configure_arithmetic(general, compute_dtype, CPU)
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # torch's default: nothing was changed
    precision.configure_arithmetic(general, compute_dtype, torch.device("cuda", 0))
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == float32
    assert torch.are_deterministic_algorithms_enabled() == torch.backends.cudnn.deterministic == general.deterministic
    assert torch.backends.cudnn.benchmark != general.deterministic


def test_the_loss_scale_halves_at_overflow_and_doubles_after_a_while() -> None:
    overflow, fine = torch.tensor(True), torch.tensor(False)
    scale = LossScale(CPU)
    for _ in range(3):
        scale.update(overflow)
    assert scale.read() == LossScaleState(2.0**13, skipped=3, skipped_in_a_row=3, growth_tracker=0)
    for _ in range(1999):
        scale.update(fine)
    assert scale.read() == LossScaleState(2.0**13, skipped=3, skipped_in_a_row=0, growth_tracker=1999)
    resumed = LossScale(CPU)
    resumed.load_state_dict(scale.state_dict())
    resumed.update(fine)
    assert resumed.read() == LossScaleState(2.0**14, skipped=3, skipped_in_a_row=0, growth_tracker=0)
    for step in range(MAX_SKIPPED):
        assert not resumed.read().is_lost, step
        resumed.update(overflow)
    assert resumed.read().is_lost


@pytest.mark.parametrize("scale, grown", [(2.0**23, 2.0**24), (2.0**24, 2.0**24), (2.0**30, 2.0**30)])
def test_the_loss_scale_grows_up_to_a_bound(scale: float, grown: float) -> None:
    loss_scale = scaled(scale, growth_tracker=1999)
    loss_scale.update(torch.tensor(False))
    assert loss_scale.read().value == grown


def scaled(value: float, growth_tracker: int = 0) -> LossScale:
    scale = LossScale(CPU)
    scale.load_state_dict({"loss_scale": torch.tensor([value, 0, 0, growth_tracker], dtype=torch.float64)})
    return scale


@pytest.mark.parametrize("row", [[0.0, 0, 0, 0], [float("nan"), 0, 0, 0], [1.0, -1, 0, 0], [1.0, 0], [1.0] * 5])
def test_a_damaged_loss_scale_is_refused(row: list[float]) -> None:
    with pytest.raises(ValueError, match="checkpoint is damaged: loss_scale"):
        LossScale(CPU).load_state_dict({"loss_scale": torch.tensor(row)})


class _Types(TorchDispatchMode):
    """Record the types that convolutions and BN compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv: list[tuple[torch.dtype, ...]] = []  # types of data and weight
        self.norm: list[tuple[torch.dtype, ...]] = []  # types of data, gamma and the batch's mean

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.conv.append((args[0].dtype, args[1].dtype))
        if func is torch.ops.aten.native_batch_norm.default:
            self.norm.append((args[0].dtype, args[1].dtype, out[1].dtype))
        return out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_losses_statistics_last_convolutions_and_weights_are_float32(load: Run, compute_dtype: Any, dtype: str) -> None:
    compute_dtype(dtype)
    trainer, batches = make_trainer(load("General.fp16=True", "General.batch_image=2"))
    half, single = getattr(torch, dtype), torch.float32
    with _Types() as seen:
        record = trainer.step(batches[:1], 0)
    assert seen.conv.count((single, single)) == 2 * 5  # of both subnets, at five levels
    assert set(seen.conv) == {(single, single), (half, half)}
    assert seen.conv.count((half, half)) > 20
    assert set(seen.norm) == {(half, single, single)}
    assert record.values.dtype == single
    assert record.found_inf is None if dtype == "bfloat16" else not record.found_inf
    state = [*trainer.module.state_dict().values(), *trainer.optimizer.state_dict().values()]
    assert {tensor.dtype for tensor in state} == {single}
    assert {p.grad.dtype for p in trainer.module.parameters() if p.grad is not None} == {single}
    assert (trainer.scale is not None) == (dtype == "float16")


@pytest.mark.parametrize("dtype, unit", [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_follows_float32(load: Run, compute_dtype: Any, dtype: str, unit: float) -> None:
    """From the same weights a loss is an average of many values that are rounded by a unit each; measured: 0.7 units.
    The gradient's norm carries the roundings of all layers, and of BN over the few values of P7; measured: 3 %. So do
    the losses of later steps, in which two processors differ as much as two precisions; measured: 0.3 %."""
    values = {}
    for name in ("float32", dtype):
        compute_dtype(name)
        trainer, batches = make_trainer(load("General.fp16=True"))
        values[name] = torch.stack([trainer.step([batch], i).values for i, batch in enumerate(batches)])
    half, single = values[dtype], values["float32"]  # (steps, L + 1)
    torch.testing.assert_close(half[0, :-1], single[0, :-1], rtol=4 * unit, atol=0)
    torch.testing.assert_close(half[0, -1], single[0, -1], rtol=0.15, atol=0)
    torch.testing.assert_close(half[1:, :-1], single[1:, :-1], rtol=0.03, atol=0)
    assert not torch.equal(values[dtype], values["float32"])


@pytest.mark.parametrize("dtype, unit", [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_predictions_in_a_half_type_follow_those_in_float32(
    load: Run, compute_dtype: Any, dtype: str, unit: float
) -> None:
    """All convolutions compute in the half type; losses, weights and gradients are float32, and the first loss differs
    by the rounding of logits and deltas, whose errors average out; measured: 0.3 units."""
    compute_dtype(dtype)
    values = []
    for fp32_predict in (True, False):
        trainer, batches = make_trainer(load("General.fp16=True", f"RpnParam.head.fp32_predict={fp32_predict}"))
        with _Types() as seen:
            first = trainer.step(batches[:1], 0)
        single = (torch.float32, torch.float32)
        assert seen.conv.count(single) == (10 if fp32_predict else 0)
        steps = [trainer.step([batch], i + 1) for i, batch in enumerate(batches[1:])]
        values.append(torch.stack([record.values for record in (first, *steps)]))
        assert {p.grad.dtype for p in trainer.module.parameters() if p.grad is not None} == {torch.float32}
    single, half = values  # (steps, L + 1)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half[0, :-1], single[0, :-1], rtol=2 * unit, atol=0)
    torch.testing.assert_close(half[1:, :-1], single[1:, :-1], rtol=0.03, atol=0)
    assert not torch.equal(half, single)


def test_a_step_that_overflows_changes_nothing_but_the_scale(load: Run, compute_dtype: Any) -> None:
    compute_dtype("float16")
    trainer, batches = make_trainer(load("General.fp16=True"))
    trainer.step(batches[:1], 0)
    before = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    momentum = {name: value.clone() for name, value in trainer.optimizer.state_dict().items()}
    trainer = replace(trainer, scale=scaled(2.0**40))
    record = trainer.step([dict(batches[1])], 1)
    assert record.found_inf
    assert record.values[:-1].isfinite().all()  # the losses are fine
    assert trainer.scale is not None
    assert trainer.scale.read() == LossScaleState(2.0**39, skipped=1, skipped_in_a_row=1, growth_tracker=0)
    assert all(torch.equal(value, before[name]) for name, value in trainer.module.state_dict().items())
    assert all(torch.equal(value, momentum[name]) for name, value in trainer.optimizer.state_dict().items())
    trainer = replace(trainer, scale=scaled(2.0**10))
    assert not trainer.step(batches[1:2], 1).found_inf
    after = trainer.module.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed >= {"cls_pred_weight", "bn0_moving_mean"}


class _HostReads(TorchDispatchMode):
    """Record the operators that make the host wait for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(i is not None and i.dtype == torch.bool for i in args[1] or ())
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_host_reads_nothing_in_a_step(
    load: Run, compute_dtype: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_dtype(dtype)
    for module in ("smooth_l1", "focal_loss"):  # on a CPU these two read whether the factor is 1
        monkeypatch.setattr(f"operator_cxx.{module}.scaled", lambda grad, factor: [g * factor for g in grad])
    trainer, batches = make_trainer(load("General.fp16=True", "OptimizeParam.accumulate=2"))
    with _HostReads() as reads:
        record = trainer.step(batches[:2], 0)
    assert reads.seen == []
    with _HostReads() as reads:
        assert record.values.isfinite().all()
    assert reads.seen


def test_the_update_does_not_depend_on_the_scale(load: Run, compute_dtype: Any) -> None:
    compute_dtype("float16")
    norms = []
    for scale in (2.0**8, 2.0**14):
        trainer, batches = make_trainer(load("General.fp16=True"))
        trainer = replace(trainer, scale=scaled(scale))
        norms.append(trainer.step(batches[:1], 0).values[-1])
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=0)


def test_a_run_in_float16_logs_its_scale_and_resumes_to_the_same_bytes(
    run: Run, tmp_path: Path, compute_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_dtype("float16")
    monkeypatch.setattr(precision, "INIT_SCALE", 2.0**27)  # the first steps overflow
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 4)
    run("General.fp16=True", name="whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        run("General.fp16=True", name="parts")
    stopped = latest(tmp_path / "parts")
    assert stopped is not None
    assert stopped.progress.step == 7
    run("General.fp16=True", name="parts", resume=True)
    for suffix in (".safetensors", ".state.safetensors"):
        whole, parts = (load_file(tmp_path / name / f"checkpoint-0003{suffix}") for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole), suffix
    lines = records(tmp_path / "whole")
    assert (lines[0]["skipped"], lines[0]["loss_scale"]) == (2.0, 2.0**25)
    assert lines[0]["cls_loss"] is None  # both steps were skipped
    assert 2 < lines[-1]["skipped"] < 15
    assert lines[-2]["cls_loss"] > 0
    assert "computing in float16" in (tmp_path / "whole" / "log.txt").read_text()
    assert "loss_scale" in load_file(tmp_path / "whole" / "checkpoint-0003.state.safetensors")


def test_a_checkpoint_of_one_precision_resumes_in_another(run: Run, tmp_path: Path, compute_dtype: Any) -> None:
    constant = ("General.fp16=True", "OptimizeParam.schedule.lr_epoch=()")
    compute_dtype("float16")
    run(*constant, "OptimizeParam.schedule.end_epoch=1")
    compute_dtype("float32")
    run(*constant, "OptimizeParam.schedule.end_epoch=2", resume=True)
    assert "loss_scale" not in load_file(tmp_path / "run" / "checkpoint-0002.state.safetensors")
    compute_dtype("float16")
    run(*constant, resume=True)
    state = load_file(tmp_path / "run" / "checkpoint-0003.state.safetensors")
    assert state["loss_scale"].tolist()[1:3] == [0, 0]


def test_a_loss_that_stays_not_finite_stops_with_step_and_images(
    run: Run, tmp_path: Path, compute_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_dtype("float16")
    monkeypatch.setattr(precision, "MAX_SKIPPED", 5)
    plain = Trainer.step

    def poisoned(self: Trainer, batches: list[Batch], number: int) -> Any:
        if number >= 6:
            for batch in batches:
                batch["image"] = torch.full(batch["image"].shape, torch.nan)
        return plain(self, batches, number)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(FloatingPointError) as error:
        run("General.fp16=True")
    message = str(error.value)
    # the host reads the scale with the log lines: that of steps 10 and 11 is the first with 5 in a row
    assert "not finite at step 10, one of 6 consecutive skipped steps (float16, loss scale" in message
    assert "cls_loss nan" in message
    assert message.count(".jpg") == 4
    assert "General.bf16" in message
    newest = latest(tmp_path / "run")  # written in the meantime, and valid to resume from
    assert newest is not None
    assert str(newest.weights) in message
    assert all(value.isfinite().all() for value in load_file(newest.weights).values())
