import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from operator_cxx import build

ROOT = Path(__file__).parents[2]
PORTABLE = "x86-64" if platform.machine() in ("x86_64", "AMD64") else "armv8-a"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NECKLACE_MARCH", "NECKLACE_CUDA", "NECKLACE_CUDA_ARCHS", "NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Copy the sources; builds there compile only error.cc, into the copy's folder `built`."""
    folder = tmp_path / "operator_cxx"
    shutil.copytree(build.HERE, folder, ignore=shutil.ignore_patterns("built", "*.so", "__pycache__"))
    monkeypatch.setattr(build, "HERE", folder)
    monkeypatch.setattr(build, "BUILT", folder / "built")
    monkeypatch.setattr(build, "STEMS", ("error",))
    return folder


@pytest.fixture
def only_program(monkeypatch, tmp_path):
    """Return a function that creates programs from shell scripts, in a folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    compiler = build.compiler()
    monkeypatch.setenv("CXX", " ".join(compiler))
    compiler_folder = str(Path(shutil.which(compiler[0])).parent)

    def make(**scripts):
        for name, script in scripts.items():
            program = folder / name.replace("_", "-")
            program.write_text(f"#!/bin/sh\nPATH={compiler_folder}:/usr/bin:/bin\n{script}\n")
            program.chmod(0o755)
        # the compiler finds the assembler on PATH, so it is called through a wrapper that sets it
        wrapper = folder / "the-compiler"
        wrapper.write_text(f'#!/bin/sh\nPATH={compiler_folder}:/usr/bin:/bin exec {" ".join(compiler)} "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("CXX", "the-compiler")
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setenv("CUDA_HOME", str(folder))

    return make


FAKE_NVCC = """
[ "$*" = "${*%--version}" ] || { echo "Cuda compilation tools, release 99.0"; exit 0; }
for word in "$@"; do [ "$last" = -o ] && echo "$*" > "$word"; last=$word; done
"""


def test_build_info_of_a_library(small):
    out = small / "built" / "necklace_cpu.so"
    assert build.build_cpu(out) is True
    library = ctypes.CDLL(str(out))
    library.nk_build_info.restype = library.nk_error_string.restype = ctypes.c_char_p
    info = build.read_info(out)
    assert build.json.loads(library.nk_build_info()) == info
    assert library.nk_error_string(0) == b"no error"
    assert info["sources"] == build.source_hash()
    assert info["target"] == "native"
    assert info["flags"].endswith("-march=native")
    build.require_usable(info, "what was built here")


def test_an_up_to_date_library_is_not_rebuilt(small, monkeypatch):
    out = small / "built" / "necklace_cpu.so"
    assert build.build_cpu(out) is True
    before, inode = out.stat().st_mtime_ns, out.stat().st_ino
    assert build.build_cpu(out) is False
    assert out.stat().st_mtime_ns == before
    assert build.build_cpu(out, ["-g"]) is True  # other flags
    assert out.stat().st_ino != inode  # running programs keep their file
    monkeypatch.setenv("NECKLACE_MARCH", PORTABLE)
    assert build.build_cpu(out, ["-g"]) is True  # another processor
    with (small / "include" / "common.h").open("a") as header:
        header.write("// changed\n")
    assert build.build_cpu(out, ["-g"]) is True  # other sources
    assert build.build_cpu(out, ["-g"]) is False
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_every_source_is_hashed(small):
    sources = [path for path in small.rglob("*") if path.suffix in (".h", ".cuh", ".cc", ".cu", ".pyx")]
    kernels = [path for path in sources if "mxnet_ops" not in path.parts]  # which has a hash of its own
    assert len(kernels) > 25
    for path in [*kernels, small / "build.py"]:
        before = build.source_hash()
        path.write_bytes(path.read_bytes() + b"\n")
        assert build.source_hash() != before, path


def test_for_any_processor(small, monkeypatch):
    monkeypatch.setenv("NECKLACE_MARCH", PORTABLE)
    build.build_cpu(small / "portable.so")
    info = build.read_info(small / "portable.so")
    assert info["target"] == PORTABLE
    assert info["features"] == []
    monkeypatch.setenv("NECKLACE_MARCH", "")
    build.build_cpu(small / "default.so")
    assert "-march" not in build.read_info(small / "default.so")["flags"]


def test_features_are_those_of_the_flags(small):
    build.build_cpu(small / "avx2.so", ["-march=x86-64-v3"] if PORTABLE == "x86-64" else [])
    features = build.read_info(small / "avx2.so")["features"]
    assert ({"avx2", "fma", "bmi2"} <= set(features)) == (PORTABLE == "x86-64")
    assert "avx512f" not in features


@pytest.mark.parametrize(
    "info, message",
    [
        ({}, "it was built from other sources: rebuild it with make ops"),
        ({"sources": "0123456789abcdef"}, "it was built from other sources"),
        (
            {"sources": None, "features": ["fpu", "no_such"]},
            "a processor with no_such, which this one lacks.*MARCH=x86-64-v3",
        ),
    ],
)
def test_unusable_libraries_are_refused(monkeypatch, tmp_path, info, message):
    monkeypatch.setattr(build, "_processor_features", lambda wanted: set(wanted) - {"no_such"})
    if "sources" in info:
        info = {**info, "sources": info["sources"] or build.source_hash()}
    with pytest.raises(ValueError, match=message):
        build.require_usable(info, "it")


def test_processor_features_are_read(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: "processor : 0\nflags\t\t: fpu avx avx2\nflags : other\n")
    assert build._processor_features(["avx2", "avx512f"]) == {"avx2"}
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert build._processor_features(["avx2", "avx512f"]) == {"avx2", "avx512f"}


def test_compiler_error_is_shown(small):
    (small / "kernels" / "cpu" / "error.cc").write_text("int broken() { return undeclared; }\n")
    with pytest.raises(build.BuildError, match=r"(?s)-c .*error\.cc.*undeclared"):
        build.build_cpu(small / "built" / "necklace_cpu.so")
    assert list((small / "built").iterdir()) == []


def test_missing_compilers(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(build.BuildError, match=r"CXX=no-such-compiler -O2: expected .* no no-such-compiler") as raised:
        build.compiler()
    assert not isinstance(raised.value, build.NoCompilerError)  # an invalid setting must not be ignored
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.NoCompilerError, match=r"install one .* or set CXX"):
        build.compiler()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.NoCompilerError, match="set NVCC or CUDA_HOME"):
        build.cuda_compiler()


def test_compiler_with_a_launcher(small, monkeypatch):
    monkeypatch.setenv("CXX", f"env LANG=C {' '.join(build.compiler())}")
    assert build.build_cpu(small / "built" / "necklace_cpu.so") is True


def test_arch_flags():
    assert build.arch_flags("75,90+PTX") == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert build.arch_flags("90a") == ["-gencode=arch=compute_90a,code=sm_90a"]


@pytest.mark.parametrize("archs", ["7.5", "sm_75", "75;80", "75,", "PTX", "+PTX", "75+ptx", "native"])
def test_invalid_archs(archs):
    with pytest.raises(build.BuildError, match=r'expected compute capabilities as in "75,80,90\+PTX", got "'):
        build.arch_flags(archs)


def test_gpu_archs_are_queried(only_program):
    only_program()
    assert build.gpu_archs() == ""
    only_program(nvidia_smi="echo 9.0; echo 10.0; echo 8.6; echo 9.0")
    assert build.gpu_archs() == "86,90,100"
    only_program(nvidia_smi="echo 9.0; exit 9")
    assert build.gpu_archs() == ""


def test_without_gpus_only_the_cpu_library_is_built(small, only_program):
    only_program(nvcc=FAKE_NVCC)
    assert list(build.build_all()) == ["operator_cxx/built/necklace_cpu.so: built"]
    assert list(build.build_all()) == ["operator_cxx/built/necklace_cpu.so: up to date"]


def test_gpus_get_a_library(small, only_program, monkeypatch):
    only_program(nvcc=FAKE_NVCC, nvidia_smi="echo 9.0")
    assert list(build.build_all())[1:] == ["operator_cxx/built/necklace_cuda.so: built"]
    arguments = build.library_path("cuda").read_text()  # the fake compiler writes its arguments
    assert "-fmad=false" in arguments
    assert "-gencode=arch=compute_90,code=sm_90 " in arguments
    monkeypatch.setenv("NECKLACE_CUDA_ARCHS", "75,80+PTX")
    list(build.build_all())
    arguments = build.library_path("cuda").read_text()
    assert "code=compute_80" in arguments
    assert "compute_90" not in arguments
    monkeypatch.setenv("NECKLACE_CUDA", "0")
    assert len(list(build.build_all())) == 1


def test_gpus_without_nvcc(small, only_program, monkeypatch):
    only_program(nvidia_smi="echo 9.0")
    said = list(build.build_all())
    assert said[1].startswith("operators for GPUs not built, plain torch is used there: no CUDA compiler")
    monkeypatch.setenv("NECKLACE_CUDA", "1")
    with pytest.raises(build.BuildError, match=r"(?s)no CUDA compiler.*NECKLACE_CUDA=0 builds without"):
        list(build.build_all())
    monkeypatch.delenv("NECKLACE_CUDA")
    monkeypatch.setenv("NECKLACE_CUDA_ARCHS", "90")
    with pytest.raises(build.BuildError, match=r"(?s)no CUDA compiler.*NECKLACE_CUDA=0 builds without"):
        list(build.build_all())


def test_a_failing_cuda_build_names_the_remedy(small, only_program, monkeypatch):
    only_program(nvcc="echo nvcc is broken; exit 1", nvidia_smi="echo 9.0")
    with pytest.raises(build.BuildError, match=r"(?s)nvcc is broken.*NECKLACE_CUDA=0 builds without"):
        list(build.build_all())
    monkeypatch.setenv("NECKLACE_CUDA", "maybe")
    with pytest.raises(build.BuildError, match="NECKLACE_CUDA: expected 0, 1 or nothing, got 'maybe'"):
        list(build.build_all())


def test_cuda_for_no_gpu(small, only_program, monkeypatch):
    only_program(nvcc=FAKE_NVCC)
    monkeypatch.setenv("NECKLACE_CUDA", "1")
    with pytest.raises(build.BuildError, match="no GPU to build for: set for example NECKLACE_CUDA_ARCHS=75"):
        list(build.build_all())


def run(command, **environment):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("command", [["operator_cxx/build.py", "cpu"], ["setup.py", "build_ext", "--inplace"]])
def test_programs_say_that_there_is_no_compiler(tmp_path, command):
    done = run(command, PATH=str(tmp_path), CXX="")
    assert done.returncode == build.NoCompilerError.STATUS
    assert done.stderr.count("\n") == 1
    assert "not built" in done.stderr
    assert "no C++ compiler: install one" in done.stderr
    done = run(command, CXX="no-such-compiler")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "there is no no-such-compiler" in done.stderr


def test_options_of_the_program(tmp_path):
    done = run(["operator_cxx/build.py", "cuda", "--archs", "x", "--out", str(tmp_path / "x.so")], NVCC=sys.executable)
    assert done.returncode == 1
    assert 'got "x"' in done.stderr


def test_installing_compiles_nothing(tmp_path):
    done = run(
        ["setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)], PATH=str(tmp_path), CXX="no-such-compiler"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "necklace.egg-info" / "PKG-INFO").exists()


def test_without_cython_the_kernels_are_built(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        build.HERE, tmp_path / "operator_cxx", ignore=shutil.ignore_patterns("numpy_ops.*.so", "__pycache__")
    )
    (tmp_path / "hidden" / "Cython").mkdir(parents=True)
    (tmp_path / "hidden" / "Cython" / "__init__.py").write_text("raise ImportError\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "hidden"), "NECKLACE_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels, binding = done.stdout.splitlines()
    assert kernels.startswith("operator_cxx/built/necklace_cpu.so: ")
    assert binding == "NumPy binding not built: pip install cython"


@pytest.mark.parametrize("stem", build.STEMS)
def test_sources_compile_without_a_warning(stem):
    source = build.HERE / "kernels" / "cpu" / f"{stem}.cc"
    build.run([*build.compiler(), *build.CXX_FLAGS, *build.include_flags(), "-Werror", "-fsyntax-only", str(source)])


def test_the_interface_is_c():
    strict = ["-x", "c", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    build.run([*build.compiler(), *strict, "-fsyntax-only", str(build.HERE / "include" / "necklace.h")])
