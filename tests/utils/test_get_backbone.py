"""The download with a stub of huggingface_hub: no test uses the network."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch

from utils import get_backbone as script

UNITS_18 = (2, 2, 2, 2)


def stand_in(monkeypatch: pytest.MonkeyPatch, answer: Path | OSError) -> list[tuple[str, str]]:
    """Install a huggingface_hub whose download gives `answer`; returns the list of its calls."""
    calls: list[tuple[str, str]] = []

    def hf_hub_download(repository: str, name: str) -> str:
        calls.append((repository, name))
        if isinstance(answer, OSError):
            raise answer
        return str(answer)

    module = ModuleType("huggingface_hub")
    monkeypatch.setattr(module, "hf_hub_download", hf_hub_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


@pytest.fixture
def resnet18(tmp_path: Path) -> Path:
    """Write a file with enough names to be recognised as ResNet-18."""
    tensors = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    for stage, units in enumerate(UNITS_18, start=1):
        for unit in range(units):
            tensors[f"layer{stage}.{unit}.conv1.weight"] = torch.zeros(1)
    path = tmp_path / "downloaded.safetensors"
    safetensors.torch.save_file(tensors, path)
    return path


def test_the_file_is_written_where_training_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resnet18: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, resnet18)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["get_backbone.py", "--depth", "18"])
    script.main()
    assert calls == [("timm/resnet18.tv_in1k", "model.safetensors")]
    assert Path("pretrain_model/resnet18_v1b.safetensors").read_bytes() == resnet18.read_bytes()
    assert capsys.readouterr().out == "pretrain_model/resnet18_v1b.safetensors\n"


def test_another_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resnet18: Path) -> None:
    stand_in(monkeypatch, resnet18)
    with pytest.raises(ValueError, match="holds ResNet-18, not ResNet-50"):
        script.get_backbone(50, tmp_path / "out.safetensors")
    assert os.listdir(tmp_path) == ["downloaded.safetensors"]


def test_a_failed_download_says_how_to_do_it_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, OSError("no route"))
    with pytest.raises(OSError, match=r"no route.*timm/resnet50\.tv_in1k on the Hugging Face hub .*out\.safetensors"):
        script.get_backbone(50, tmp_path / "out.safetensors")


def test_without_the_hub_library_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # makes the import fail
    monkeypatch.setattr(sys, "argv", ["get_backbone.py", "--out", str(tmp_path / "out.safetensors")])
    with pytest.raises(SystemExit, match="error: huggingface_hub is not installed: pip install huggingface-hub"):
        script.main()
