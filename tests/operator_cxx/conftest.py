"""Fixture `device`, which runs a test on every implementation of the operators: create the tensors on it."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from operator_cxx import build, library

HERE = Path(__file__).parent
EMULATOR = HERE / "cuda_emulator"
ROOT = HERE.parents[1]
IMPLEMENTATIONS = ["reference", "compiled", "emulated"]
if torch.cuda.is_available() and os.environ.get("NECKLACE_CUDA") != "0":
    IMPLEMENTATIONS.append("cuda")
try:
    build.compiler()
except build.NoCompilerError:
    IMPLEMENTATIONS = ["reference"]
    collect_ignore = ["test_numpy_ops.py"]


def pytest_collection_modifyitems(config, items):
    """Without a compiler, keep only the tests of plain torch."""

    def plain(item):
        return hasattr(item, "callspec") and item.callspec.params.get("device") == "reference"

    if IMPLEMENTATIONS == ["reference"]:
        kept = [item for item in items if item.path.parent != HERE or plain(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request, monkeypatch):
    """Return the device for tensors, with operators of plain torch, of the CPU library, of the CUDA kernels emulated on
    the CPU or, if there is a GPU, of the CUDA library."""
    if request.param == "reference":
        monkeypatch.setattr(library, "loaded", {})
    elif request.param == "emulated":
        monkeypatch.setattr(library, "loaded", {"cpu": request.getfixturevalue("emulated_kernels")})
    elif request.param == "compiled":
        assert "cpu" in library.loaded, library.notes
    else:
        assert "cuda" in library.loaded, library.notes
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(scope="session")
def emulated_kernels():
    """Return the CUDA kernels compiled with cuda_emulator/cuda_runtime.h, built once per sources and compiler."""
    header = (EMULATOR / "cuda_runtime.h").read_bytes()
    stamp = hashlib.sha256(header + f"{build.source_hash()} {build.compiler()}".encode()).hexdigest()[:16]
    path = ROOT / "build" / f"emulated-{stamp}" / "necklace_emulated.so"
    if not path.exists():
        build.build_emulated(path, EMULATOR)
    return library.Kernels(path)
