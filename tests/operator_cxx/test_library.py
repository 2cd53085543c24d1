import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from operator_cxx import build, library

HEADER = (build.HERE / "include" / "necklace.h").read_text()
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NECKLACE_OPS", "NECKLACE_OPS_LIBRARY", "NECKLACE_CUDA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stub(tmp_path):
    """Return a function that builds a library whose functions return `status`, with the given nk_build_info."""

    def make(name="necklace_cpu.so", *, status=0, without="nothing", **info):
        about = {"sources": build.source_hash(), "target": "a test", "features": [], **info}
        answers = {"nk_build_info": f'R"json({build.json.dumps(about)})json"', "nk_error_string": '"a planted error"'}
        lines = ['#include "necklace.h"']
        for declaration, function in re.findall(r"(NK_EXPORT [^;]*?(nk_\w+)\([^;]*\));", HEADER):
            if function != without:
                lines.append(f"{declaration} {{ return {answers.get(function, status)}; }}")
        source = tmp_path / f"{name}.cc"
        source.write_text("\n".join(lines))
        command = [*build.compiler(), "-std=c++20", "-fPIC", "-shared", *build.include_flags(), str(source)]
        subprocess.run([*command, f"-Wl,-soname,{name}", "-o", str(tmp_path / name)], check=True)
        return tmp_path / name

    return make


def test_every_declaration_is_read():
    found = library._declarations()
    assert len(found) == len(re.findall(r"^NK_EXPORT ", HEADER, re.MULTILINE)) == 13
    pointer, i32, i64, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
    assert found["nk_build_info"] == (ctypes.c_char_p, [])
    assert found["nk_error_string"] == (ctypes.c_char_p, [i32])
    assert found["nk_nms_workspace"] == (i64, [i64, i64, i64])
    nms = [
        pointer,
        pointer,
        pointer,
        i64,
        i64,
        f32,
        i32,
        f32,
        f32,
        f32,
        i64,
        pointer,
        pointer,
        pointer,
        ctypes.c_ssize_t,
    ]
    assert found["nk_nms"] == (i32, nms)


def test_types_have_the_codes_of_the_interface():
    codes = dict(re.findall(r"NK_(B?FLOAT\d\d) = (\d)", HEADER))
    assert {str(dtype).removeprefix("torch.").upper(): str(code) for dtype, code in library.DTYPES.items()} == codes


def test_the_library_of_these_sources_loads(stub):
    assert library.Kernels(stub()).info["sources"] == build.source_hash()


def test_stale_library(stub):
    with pytest.raises(ValueError, match=r"necklace_cpu\.so was built from other sources: rebuild it with make ops"):
        library.Kernels(stub(sources="0123456789abcdef"))


def test_library_for_another_processor(stub, monkeypatch):
    monkeypatch.setattr(build, "_processor_features", lambda wanted: {"avx"})
    with pytest.raises(
        ValueError, match=r"a processor with avx2, fma, which this one lacks: .*NECKLACE_MARCH=x86-64-v3"
    ):
        library.Kernels(stub(features=["avx", "fma", "avx2"]))


def test_library_without_a_function(stub):
    with pytest.raises(ValueError, match=r"necklace_cpu\.so has no nk_nms_workspace: rebuild it with make ops"):
        library.Kernels(stub(without="nk_nms_workspace"))


def test_kernel_that_fails(stub):
    kernels = library.Kernels(stub(status=7))
    box = torch.zeros(1, 4)
    with pytest.raises(
        RuntimeError, match=r"bbox_overlaps: launching on cpu failed: a planted error \(7\); .* for a test"
    ):
        kernels.run("bbox_overlaps", box, box, box, 0, 1, 1, torch.zeros(1, 1))
    assert kernels.workspace("nms", box, 1, 2, 3).shape == (7,)
    with pytest.raises(AssertionError, match="bbox_overlaps: devices differ"):
        kernels.run("bbox_overlaps", box, box, box.to("meta"), 0, 1, 1, torch.zeros(1, 1))


def test_arguments_reach_the_kernel():
    address = library._address
    tensor = torch.arange(6).reshape(2, 3)
    assert address(tensor[1:]) == tensor.data_ptr() + 3 * 8
    assert address(None) is None
    assert list(address((2**40, -1))) == [2**40, -1]
    assert address(0.5) == 0.5


def load(monkeypatch, folder, **environment):
    """Return what library.py loads at import if the libraries are in `folder`."""
    monkeypatch.setattr(library, "library_path", lambda kind: folder / f"necklace_{kind}.so")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return library._load()


def test_kernels_are_found(stub, monkeypatch, tmp_path):
    stub()
    found, notes = load(monkeypatch, tmp_path, NECKLACE_OPS="compiled", NECKLACE_CUDA="0")
    assert set(found) == {"cpu"}
    assert notes[0] == "operators: compiled for cpu (a test)"


def test_kernels_of_another_library(stub, monkeypatch, tmp_path):
    stub("other.so", target="elsewhere")
    found, notes = load(monkeypatch, Path("/"), NECKLACE_OPS_LIBRARY=str(tmp_path / "other.so"))
    assert found["cpu"].info["target"] == "elsewhere"
    assert notes[0] == "operators: compiled for cpu (elsewhere)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert set(load(monkeypatch, Path("/"))[0]) == {"cpu"}  # the variable names a CPU library


def test_without_kernels_plain_torch_is_used(stub, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    slower = "operators: plain torch on cpu, slower: "
    assert load(monkeypatch, tmp_path) == ({}, [f"{slower}necklace_cpu.so is not built (make ops builds it)"])
    path = stub(sources="stale")
    assert load(monkeypatch, tmp_path) == (
        {},
        [f"{slower}{path} was built from other sources: rebuild it with make ops"],
    )
    path.write_bytes(b'{"sources": "%s"}\0' % build.source_hash().encode())  # the right hash, but not a library
    found, (note,) = load(monkeypatch, tmp_path)
    assert found == {}
    assert note.startswith(f"{slower}{path}: ")


def test_kernels_or_nothing(stub, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match=r"NECKLACE_OPS=compiled, but the operators for cpu: .* is not built"):
        load(monkeypatch, tmp_path, NECKLACE_OPS="compiled")
    stub(sources="stale")
    with pytest.raises(RuntimeError, match=r"NECKLACE_OPS=compiled, but the operators for cpu: .* from other sources"):
        load(monkeypatch, tmp_path)
    stub()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"NECKLACE_OPS=compiled, but the operators for cuda: necklace_cuda\.so is not"
    ):
        load(monkeypatch, tmp_path)


def test_gpu_without_its_kernels(stub, monkeypatch, tmp_path):
    stub()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found, notes = load(monkeypatch, tmp_path)
    assert set(found) == {"cpu"}
    assert notes[1] == "operators: plain torch on cuda, slower: necklace_cuda.so is not built (make ops builds it)"
    stub("necklace_cuda.so", target="90")
    found, notes = load(monkeypatch, tmp_path)
    assert set(found) == {"cpu", "cuda"}
    assert notes[1] == "operators: compiled for cuda (90)"
    found, notes = load(monkeypatch, tmp_path, NECKLACE_CUDA="0", NECKLACE_OPS="compiled")
    assert set(found) == {"cpu"}
    assert notes[1] == "operators: plain torch on cuda, because NECKLACE_CUDA=0"


def test_unknown_setting(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="NECKLACE_OPS: expected reference, compiled or nothing, got 'fast'"):
        load(monkeypatch, tmp_path, NECKLACE_OPS="fast")


PROGRAM = """
import torch
from operator_cxx import library
from operator_cxx.smooth_l1 import smooth_l1_loss
one = torch.ones(1, 4, 2)
print(sorted(library.loaded), smooth_l1_loss([one], one * 3, one, beta=1.0).item())
"""


def test_the_environment_decides_at_import(tmp_path):
    def run(setting):
        environment = os.environ | {"NECKLACE_OPS": setting, "NECKLACE_CUDA": "0"}
        return subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    assert run("reference").stdout == "[] 12.0\n"
    assert run("compiled").stdout == "['cpu'] 12.0\n"
    assert "expected reference, compiled or nothing, got 'yes'" in run("yes").stderr


def test_a_failing_kernel_raises_in_numpy(stub):
    # LD_LIBRARY_PATH is searched before the extension's own folder.
    program = "from operator_cxx import numpy_ops; numpy_ops.bbox_overlaps([[0, 0, 1, 1]], [[0, 0, 1, 1]])"
    environment = os.environ | {"LD_LIBRARY_PATH": str(stub(status=7).parent)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "RuntimeError: bbox_overlaps: the kernel failed: a planted error (7)" in done.stderr


def test_serves_can_be_traced(monkeypatch):
    @torch.compile(fullgraph=True, backend="eager")
    def served(x):
        return x + 1 if library.serves(x, torch.float32, torch.float16) else x - 1

    monkeypatch.setattr(library, "loaded", {"cpu": object()})
    assert served(torch.zeros(2)).tolist() == [1, 1]
    assert served(torch.zeros(2, dtype=torch.float64)).tolist() == [-1, -1]
    monkeypatch.setattr(library, "loaded", {})
    assert served(torch.zeros(2)).tolist() == [-1, -1]


def test_types_that_kernels_support(monkeypatch):
    monkeypatch.setattr(library, "loaded", {"cpu": object()})
    assert library.serves(torch.zeros(1, dtype=torch.bfloat16))
    assert library.serves(torch.zeros(1), torch.float32)
    assert not library.serves(torch.zeros(1, dtype=torch.float16), torch.float32)
    assert not library.serves(torch.zeros(1, dtype=torch.int64))
    assert not library.serves(torch.zeros(1, device="meta"))
