"""Checkpoints: saving, finding, pruning, and errors for damaged files and other models."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from core.weights.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    Progress,
    epoch_stem,
    find_weights,
    latest,
    load_weights,
    read_tensors,
    save_checkpoint,
    step_stem,
)
from core.weights.fit import check_fit, keep_fitting, require_fit

SHAPES = {"conv0_weight": (64, 3, 7, 7), "bn0_gamma": (64,), "bn0_moving_var": (64,)}
SIZE = 4 * (64 * 3 * 7 * 7 + 64 + 64)  # bytes of the weights


def make_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def make_state(seed: int) -> dict[str, Tensor]:
    return {"conv0_weight": torch.full(SHAPES["conv0_weight"], float(seed))}


def make_progress(epoch: int, step: int) -> Progress:
    return Progress(epoch=epoch, step=step, seed=7, experiment="demo", class_names=("café", 'a "b"'))


def save(folder: Path, epoch: int, *, step: int | None = None, keep: int = 0) -> Checkpoint:
    """Save a pair after `epoch` epochs of 10 steps; `step`: in the middle of the next one."""
    stem = epoch_stem(epoch) if step is None else step_stem(step)
    progress = make_progress(epoch, 10 * epoch if step is None else step)
    return save_checkpoint(folder, stem, make_weights(progress.step), make_state(progress.step), progress, keep)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def assert_whole(pair: Checkpoint | None, step: int) -> None:
    assert pair is not None
    assert pair.progress.step == step
    assert_equal(load_weights(pair.weights)[0], make_weights(step))
    assert_equal(read_tensors(pair.state), make_state(step))


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    pair = save(tmp_path / "demo", 3)
    assert names(tmp_path / "demo") == ["checkpoint-0003.safetensors", "checkpoint-0003.state.safetensors"]
    weights, progress = load_weights(pair.weights)
    assert_equal(weights, make_weights(30))
    assert progress == make_progress(3, 30)
    assert_whole(latest(tmp_path / "demo"), 30)


def test_equal_runs_write_equal_files(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    assert a.weights.read_bytes() == b.weights.read_bytes()
    assert a.state.read_bytes() == b.state.read_bytes()


def test_views_and_strided_tensors_are_saved_by_value(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    weights = {"a": flat[:4], "b": flat[4:].view(4, 2).t(), "c": torch.nn.Parameter(flat[:2].clone())}
    pair = save_checkpoint(tmp_path, epoch_stem(1), weights, {}, make_progress(1, 10))
    assert_equal(load_weights(pair.weights)[0], {name: tensor.detach() for name, tensor in weights.items()})


def test_the_newest_state_and_every_epochs_weights_are_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
    assert names(tmp_path) == [
        "checkpoint-0001.safetensors",
        "checkpoint-0002.safetensors",
        "checkpoint-0003.safetensors",
        "checkpoint-0003.state.safetensors",
    ]


def test_weights_in_the_middle_of_an_epoch_are_removed_after_a_later_pair(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1, step=15)
    assert_whole(latest(tmp_path), 15)
    save(tmp_path, 1, step=17)
    assert names(tmp_path) == [
        "checkpoint-0001.safetensors",
        "checkpoint-step00000017.safetensors",
        "checkpoint-step00000017.state.safetensors",
    ]
    save(tmp_path, 2)
    assert names(tmp_path) == [
        "checkpoint-0001.safetensors",
        "checkpoint-0002.safetensors",
        "checkpoint-0002.state.safetensors",
    ]


def test_the_last_epochs_weights_are_kept(tmp_path: Path) -> None:
    def epochs() -> list[str]:
        return [name.removeprefix("checkpoint-").removesuffix(".safetensors") for name in names(tmp_path)]

    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
    save(tmp_path, 4, keep=3)
    assert epochs() == ["0002", "0003", "0004", "0004.state"]
    save(tmp_path, 4, step=45, keep=2)  # no epoch's weights, so that none is removed for it
    assert epochs() == ["0003", "0004", "step00000045", "step00000045.state"]
    save(tmp_path, 9999, keep=2)
    save(tmp_path, 10000, keep=2)  # sorts before 9999 as text
    assert epochs() == ["10000", "10000.state", "9999"]
    save(tmp_path, 10001, keep=1)
    assert_whole(latest(tmp_path), 100010)
    assert epochs() == ["10001", "10001.state"]


def test_other_files_are_never_removed(tmp_path: Path) -> None:
    others = ["best.safetensors", "checkpoint-0001.safetensors.bak", "checkpoint-best.safetensors", "log.txt"]
    for name in others:
        (tmp_path / name).write_text("")
    save(tmp_path, 1)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == sorted([*others, "checkpoint-0002.safetensors", "checkpoint-0002.state.safetensors"])


def test_a_damaged_older_file_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-0001.safetensors").write_text("")
    save(tmp_path, 2, keep=2)
    save(tmp_path, 3, keep=2)
    assert_whole(latest(tmp_path), 30)


def test_newest_is_by_step_not_by_name(tmp_path: Path) -> None:
    save(tmp_path, 9999)
    save(tmp_path, 10000)  # "checkpoint-10000" sorts before "checkpoint-9999"
    assert_whole(latest(tmp_path), 100000)
    assert find_weights(tmp_path).name == "checkpoint-10000.safetensors"


def test_the_newest_of_two_pairs_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs exist if the process is killed before it removes the older."""
    monkeypatch.setattr("core.weights.checkpoint.prune", lambda newest, keep: None)
    save(tmp_path, 2)
    save(tmp_path, 1, step=15)
    save(tmp_path, 10)
    assert_whole(latest(tmp_path), 100)
    (tmp_path / "checkpoint-0010.safetensors").unlink()
    assert_whole(latest(tmp_path), 20)


def test_a_run_is_finished_when_its_last_epoch_is(tmp_path: Path) -> None:
    assert not save(tmp_path, 24, step=249).is_finished(25)
    assert save(tmp_path, 25).is_finished(25)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "not there") is None


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files to `size` bytes: a write fails half way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = names(tmp_path)
    message = r"checkpoint-0002.*The previous one, .*checkpoint-0001\.safetensors, is complete"
    with pytest.raises(OSError, match=message) as info, largest_file(SIZE // 2):
        save(tmp_path, 2)
    assert info.value.errno == errno.EFBIG
    assert names(tmp_path) == before
    assert_whole(latest(tmp_path), 10)
    save(tmp_path, 2)  # the disk has space again
    assert_whole(latest(tmp_path), 20)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_disk_that_is_full_late_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fails_at: int
) -> None:
    """Flush and rename fail for the first and for the second file of the pair."""
    save(tmp_path, 1)
    before = names(tmp_path)
    original, calls = getattr(os, call), []

    def full(*args: object) -> object:
        if not _is_folder(args[0]):  # the sync of the folder does not count
            calls.append(args)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, call, full)
    message = r"No space left on device.*MB are free.*checkpoint-0001\.safetensors, is complete"
    with pytest.raises(OSError, match=message) as info:
        save(tmp_path, 2)
    monkeypatch.undo()
    assert info.value.errno == errno.ENOSPC
    assert names(tmp_path) == before
    assert_whole(latest(tmp_path), 10)


def _is_folder(target: object) -> bool:
    return isinstance(target, int) and os.path.isdir(f"/proc/self/fd/{target}")


def test_saving_the_same_step_again_on_a_full_disk_keeps_the_pair(tmp_path: Path) -> None:
    save(tmp_path, 1, step=15)
    with pytest.raises(OSError, match=r"step00000015.safetensors, is complete"), largest_file(SIZE // 2):
        save(tmp_path, 1, step=15)
    assert_whole(latest(tmp_path), 15)


def test_a_first_checkpoint_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="Free space or make the folder writable") as info,
        largest_file(SIZE // 2),
    ):
        save(tmp_path, 1)
    assert "previous" not in str(info.value)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"cannot write .*file/demo/checkpoint-0001.safetensors: Not a directory"):
        save(tmp_path / "file" / "demo", 1)


def test_files_left_by_a_killed_process_are_ignored_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".checkpoint-0002.safetensors.tmp").write_bytes(b"half")  # killed while writing
    save_checkpoint(tmp_path / "b", epoch_stem(2), make_weights(0), make_state(0), make_progress(2, 20))
    os.replace(tmp_path / "b/checkpoint-0002.state.safetensors", tmp_path / "checkpoint-0002.state.safetensors")
    assert_whole(latest(tmp_path), 10)  # epoch 2 has a state and no weights
    save(tmp_path, 3)
    assert names(tmp_path) == [
        "b",
        "checkpoint-0001.safetensors",
        "checkpoint-0003.safetensors",
        "checkpoint-0003.state.safetensors",
    ]


def test_a_state_of_another_step_is_no_pair(tmp_path: Path) -> None:
    save(tmp_path / "other", 2)
    save(tmp_path, 1)
    os.replace(tmp_path / "other/checkpoint-0002.state.safetensors", tmp_path / "checkpoint-0001.state.safetensors")
    with pytest.raises(ValueError, match="not the optimizer state"):
        latest(tmp_path)


def test_weights_without_a_state_are_not_overwritten_silently(tmp_path: Path) -> None:
    save(tmp_path, 1).state.unlink()
    with pytest.raises(ValueError, match=r"ModelParam\.init_from=.*checkpoint-0001\.safetensors"):
        latest(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut header", "cut data", "too long", "noise"])
@pytest.mark.parametrize("kind", ["weights", "state"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, kind: str) -> None:
    path: Path = getattr(save(tmp_path, 1), kind)
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut header": content[:50],
        "cut data": content[:-1],
        "too long": content + b"x",
        "noise": bytes(range(256)) * 20,
    }[damage]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{path.name} is damaged or not a safetensors file"):
        latest(tmp_path)
    with pytest.raises(ValueError, match=f"{path.name} is damaged or not a safetensors file"):
        read_tensors(path)


def test_find_weights_names_what_exists(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert find_weights(tmp_path).name == "checkpoint-0002.safetensors"
    assert find_weights(tmp_path, 1).name == "checkpoint-0001.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint-0005.*checkpoint-0001.*checkpoint-0002"):
        find_weights(tmp_path, 5)
    with pytest.raises(FileNotFoundError, match="train first"):
        find_weights(tmp_path / "not there")


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(make_weights(0), path)
    with pytest.raises(ValueError, match="not a checkpoint of this program"):
        load_weights(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    metadata = {"necklace": json.dumps({"format_version": FORMAT_VERSION + 1})}
    safetensors.torch.save_file(make_weights(0), tmp_path / "checkpoint-0001.safetensors", metadata)
    with pytest.raises(
        ValueError, match=f"has checkpoint format {FORMAT_VERSION + 1}, this program reads 2 and {FORMAT_VERSION}"
    ):
        find_weights(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.safetensors"):
        load_weights(tmp_path / "a.safetensors")


def another_model() -> dict[str, tuple[int, ...]]:
    """Return a model with other channels in conv0, without bn0, and with ten new parameters."""
    return {"conv0_weight": (32, 3, 7, 7), **{f"conv{i}_bias": (1,) for i in range(1, 11)}}


def test_the_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit this model") as info:
        require_fit(another_model(), make_weights(0), "a.safetensors")
    lines = str(info.value).splitlines()
    assert lines[1].strip() == f"10 missing: {', '.join(f'conv{i}_bias' for i in range(1, 9))}, ..."
    assert lines[2].strip() == "2 not expected: bn0_gamma, bn0_moving_var"
    assert lines[3].strip() == "1 of another shape: conv0_weight (expected (32, 3, 7, 7), got (64, 3, 7, 7))"
    assert "ModelParam.init_from=a.safetensors" in lines[4]


def test_the_weights_of_the_same_architecture_are_accepted() -> None:
    require_fit(SHAPES, make_weights(0), "a.safetensors")
    assert check_fit(SHAPES, make_weights(0)).fits


def test_fine_tuning_keeps_fitting_tensors_and_reports_the_others() -> None:
    weights = make_weights(0)
    expected = {"conv0_weight": SHAPES["conv0_weight"], "bn0_gamma": (32,), "new_bias": (1,)}
    kept, report = keep_fitting(expected, weights, "a.safetensors")
    assert_equal(kept, {"conv0_weight": weights["conv0_weight"]})
    assert report.missing == ("new_bias",)
    assert report.extra == ("bn0_moving_var",)
    assert report.different == (("bn0_gamma", (32,), (64,)),)


def test_fine_tuning_without_a_fitting_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no tensor of a.safetensors fits"):
        keep_fitting(another_model(), make_weights(0), "a.safetensors")


def test_a_state_is_not_taken_for_weights(tmp_path: Path) -> None:
    pair = save(tmp_path, 3)
    with pytest.raises(ValueError, match=r"holds the momentum of a run, not weights: .*checkpoint-0003.safetensors"):
        load_weights(pair.state)
