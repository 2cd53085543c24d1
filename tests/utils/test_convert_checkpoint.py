"""Conversion of weights between MXNet's .params and .safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

import symbol as S
from core.weights.checkpoint import load_weights
from core.weights.first_weights import load_given_weights, params_progress
from core.weights.params_file import read_params, read_params_file, write_params
from utils.convert_checkpoint import convert, main

WEIGHTS = {
    "conv0_weight": torch.arange(12.0).reshape(2, 3, 1, 2),
    "bn0_gamma": torch.tensor([0.5, 2.0], dtype=torch.float16),
    "bn0_moving_mean": torch.tensor([-1.0, 1.0]),
    "bn0_moving_var": torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
}


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "retina-0025.params"
    write_params(path, WEIGHTS)
    return path


def test_to_safetensors_and_back(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    middle, again = params.with_suffix(".safetensors"), params.with_name("again.params")
    main([str(params), str(middle)])
    main([str(middle), str(again)])
    assert capsys.readouterr().out == f"{middle}: 4 tensors\n{again}: 4 tensors\n"
    stored = safetensors.torch.load_file(middle)
    tensors = read_params(again)
    for name, tensor in WEIGHTS.items():
        assert stored[name].dtype is tensors[name].dtype is tensor.dtype
        assert torch.equal(stored[name], tensor)
        assert torch.equal(tensors[name], tensor)
    assert set(read_params_file(again).names or ()) == {
        *("arg:conv0_weight", "arg:bn0_gamma", "aux:bn0_moving_mean", "aux:bn0_moving_var")
    }


def test_the_result_is_a_checkpoint(params: Path) -> None:
    convert(params, params.with_suffix(".safetensors"))
    for tensors, progress in (load_weights(params.with_suffix(".safetensors")), load_given_weights(params)):
        assert tensors.keys() == WEIGHTS.keys()
        assert (progress.epoch, progress.step, progress.experiment, progress.class_names) == (25, 0, "retina", ())


@pytest.mark.parametrize(
    "name, epoch, experiment",
    [
        ("a-0000.params", 0, "a"),
        ("a-b-12345.params", 12345, "a-b"),
        ("a.params", 0, "a"),
        ("a-003.params", 0, "a-003"),
        ("-0003.params", 0, "-0003"),
        (f"a-{'9' * 200}.params", 0, f"a-{'9' * 200}"),
    ],
)
def test_the_epoch_is_in_mxnets_file_name(name: str, epoch: int, experiment: str) -> None:
    progress = params_progress(Path("folder") / name)
    assert (progress.epoch, progress.experiment) == (epoch, experiment)


def test_the_same_input_gives_the_same_bytes(params: Path) -> None:
    outs = [params.with_name(f"{i}.safetensors") for i in range(2)]
    for out in outs:
        convert(params, out)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_an_existing_file_is_replaced_only_by_force(params: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    target.write_text("mine")
    with pytest.raises(SystemExit, match=f"error: {target} exists: .*--force"):
        main([str(params), str(target)])
    assert target.read_text() == "mine"
    main([str(params), str(target), "--force"])
    assert load_weights(target)[1].epoch == 25


@pytest.mark.parametrize("names", [("a.params", "b.params"), ("a.safetensors", "b.pth"), ("a", "b.params")])
def test_other_formats_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"expected one \.params and one \.safetensors file, got .*a"):
        convert(tmp_path / names[0], tmp_path / names[1])


def test_a_failed_conversion_leaves_no_file(tmp_path: Path, params: Path) -> None:
    params.write_bytes(params.read_bytes()[:-1])
    safetensors.torch.save_file({"count": torch.tensor(3)}, tmp_path / "scalar.safetensors")
    with pytest.raises(SystemExit, match="error: no file"):
        main([str(tmp_path / "nothing.params"), str(tmp_path / "out.safetensors")])
    with pytest.raises(SystemExit, match="damaged"):
        main([str(params), str(tmp_path / "out.safetensors")])
    with pytest.raises(SystemExit, match="'arg:count' has the shape"):
        main([str(tmp_path / "scalar.safetensors"), str(tmp_path / "out.params")])
    assert sorted(os.listdir(tmp_path)) == ["retina-0025.params", "scalar.safetensors"]


def test_a_name_that_safetensors_cannot_hold(tmp_path: Path) -> None:
    write_params(tmp_path / "a.params", {"__metadata__": torch.ones(1)})
    with pytest.raises(SystemExit, match=r"error: .*__metadata__"):
        main([str(tmp_path / "a.params"), str(tmp_path / "a.safetensors")])
    assert os.listdir(tmp_path) == ["a.params"]


def test_a_network_keeps_what_it_computes(tmp_path: Path) -> None:
    """A module's outputs do not change when its weights pass through both formats."""
    x = S.Convolution(S.var("data"), name="conv0", num_filter=2, kernel=(3, 3), no_bias=True)
    graph = S.BatchNorm(x, name="bn0", fix_gamma=False)
    shape = (1, 3, 6, 6)
    module, other = (S.lower(graph, seed=seed, data=shape).eval() for seed in (1, 2))
    write_params(tmp_path / "a-0001.params", module.state_dict())
    convert(tmp_path / "a-0001.params", tmp_path / "a.safetensors")
    other.load_state_dict(load_weights(tmp_path / "a.safetensors")[0])
    data = torch.rand(shape)
    assert torch.equal(module(data=data)[0], other(data=data)[0])
