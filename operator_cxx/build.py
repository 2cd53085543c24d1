"""Build the kernel libraries. Requires only a compiler and the standard library, and takes seconds.

    python3 operator_cxx/build.py                every library that this machine can use
    python3 operator_cxx/build.py cpu            the library for this machine's processor
    python3 operator_cxx/build.py cuda           the library for this machine's GPUs
    python3 operator_cxx/build.py --help

A library that is up to date is not rebuilt. Environment:

    CXX, NVCC              the compilers
    NECKLACE_MARCH         target processor: native (default), x86-64-v3 for any processor with AVX2, or empty for the
                           compiler's default
    NECKLACE_CUDA          0: never build for CUDA; 1: build for CUDA or fail; empty: build if a GPU and nvcc are found
    NECKLACE_CUDA_ARCHS    compute capabilities, as in "75,80,90+PTX"; no GPU is needed if set (default: those of this
                           machine's GPUs)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BUILT = HERE / "built"
STEMS = ("anchor_target", "bbox_overlaps", "error", "focal_loss", "nms", "retina_decode", "smooth_l1")
FOLDERS: Mapping[str, str] = {".cc": "kernels/cpu", ".cu": "kernels/cuda"}  # of the sources, by suffix
ALL_ARCHS = "75,80,86,89,90+PTX"

# The compiler must not contract a * b + c or reorder sums: IoUs that are equal on one device must be equal on all.
CXX_FLAGS = shlex.split(
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -pthread -fopenmp-simd -ffp-contract=off -fno-math-errno "
    "-fno-trapping-math -Wall -Wextra -Wno-unknown-pragmas"
)
NVCC_FLAGS = shlex.split(
    "-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra -fmad=false --cudart=static"
)

# Processor features by the compiler's macro, with their names in Linux's /proc/cpuinfo.
FEATURES: Mapping[str, str] = {
    "__SSE4_2__": "sse4_2",
    "__POPCNT__": "popcnt",
    "__MOVBE__": "movbe",
    "__LZCNT__": "abm",
    "__BMI__": "bmi1",
    "__BMI2__": "bmi2",
    "__AVX__": "avx",
    "__F16C__": "f16c",
    "__FMA__": "fma",
    "__AVX2__": "avx2",
    "__AVXVNNI__": "avx_vnni",
    "__AVX512F__": "avx512f",
    "__AVX512CD__": "avx512cd",
    "__AVX512BW__": "avx512bw",
    "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl",
    "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VBMI2__": "avx512_vbmi2",
    "__AVX512VNNI__": "avx512_vnni",
    "__AVX512BITALG__": "avx512_bitalg",
    "__AVX512VPOPCNTDQ__": "avx512_vpopcntdq",
    "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16",
}


class BuildError(Exception):
    """A compilation that failed or an invalid setting; the message says how to fix it."""


class NoCompilerError(BuildError):
    """No compiler was found. Programs exit with status 3 for this reason, so that callers can continue without one."""

    STATUS = 3


def source_hash() -> str:
    """Return a hash of everything that is compiled and of the flags. A library with another hash is stale."""
    paths = [HERE / "build.py", HERE / "numpy_ops.pyx"]
    for folder in ("include", "kernels"):
        paths += [path for path in (HERE / folder).rglob("*") if path.suffix in (".h", ".cuh", ".cc", ".cu")]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def include_flags() -> list[str]:
    """Return the compiler flags that make the headers of this folder visible."""
    return [f"-I{HERE / 'include'}", f"-I{HERE / 'kernels'}"]


def library_path(kind: str) -> Path:
    """Return the path of the library of a kind: "cpu", "cuda" or "mxnet"."""
    return BUILT / f"necklace_{kind}.so"


def read_info(path: Path) -> dict[str, Any]:
    """Return the nk_build_info of a library, read without loading it; empty if there is no such library."""
    found = re.search(rb'\{"sources": [^\0]*\}', path.read_bytes()) if path.exists() else None
    return json.loads(found.group()) if found else {}


def require_usable(info: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if a library with this nk_build_info was built from other sources or for another processor."""
    if info.get("sources") != source_hash():
        raise ValueError(f"{name} was built from other sources: rebuild it with make ops")
    missing = sorted(set(info.get("features", ())) - _processor_features(info.get("features", ())))
    if missing:
        raise ValueError(
            f"{name} was built for a processor with {', '.join(missing)}, which this one lacks: rebuild it on this "
            "machine with make ops, or for both with NECKLACE_MARCH=x86-64-v3 make ops"
        )


def _processor_features(wanted: Sequence[str]) -> set[str]:
    """Return the subset of the features that this processor has; all of them if /proc/cpuinfo is missing."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return set(flags.group(1).split()) & set(wanted) if flags else set(wanted)


def compiler() -> list[str]:
    """Return the command of the C++ compiler: CXX, which may contain a launcher and flags, or the first one found."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        if shutil.which(command[0]):
            return command
        raise BuildError(f"CXX={os.environ['CXX']}: expected a C++ compiler, but there is no {command[0]}")
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise NoCompilerError("no C++ compiler: install one (Debian: g++; macOS: xcode-select --install) or set CXX")


def cuda_compiler() -> list[str]:
    """Return the command of nvcc: NVCC, or the one on PATH or in CUDA_HOME."""
    nvcc = os.environ.get("NVCC")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for name in [nvcc] if nvcc else ["nvcc", f"{home}/bin/nvcc"]:
        if found := shutil.which(name):
            return [found]
    raise NoCompilerError("no CUDA compiler: install the CUDA toolkit, or set NVCC or CUDA_HOME")


def gpu_archs() -> str:
    """Return the compute capabilities of this machine's NVIDIA GPUs, as in "80,90"; empty if it has none."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    found = re.findall(r"^(\d+)\.(\d+)$", done.stdout, re.MULTILINE) if done.returncode == 0 else []
    return ",".join(sorted({major + minor for major, minor in found}, key=int))


def arch_flags(archs: str) -> list[str]:
    """Return nvcc's flags for compute capabilities as in "75,90+PTX"."""
    flags = []
    for arch in archs.split(","):
        number = arch.removesuffix("+PTX")
        if not re.fullmatch(r"\d+[af]?", number):
            raise BuildError(f'expected compute capabilities as in "75,80,90+PTX", got "{archs}"')
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def build_cpu(out: Path, extra: Sequence[str] = ()) -> bool:
    """Build the CPU library with `extra` flags for compiling and linking. Return False if it was up to date."""
    march = os.environ.get("NECKLACE_MARCH", "native")
    command = [*compiler(), *CXX_FLAGS, *([f"-march={march}"] if march else []), *extra]
    macros = run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    features = [name for macro, name in FEATURES.items() if f"#define {macro} " in macros]
    # The extension numpy_ops links to the library by this name, whatever path it was built at.
    name = f"-install_name,@rpath/{out.name}" if sys.platform == "darwin" else f"-soname,{out.name}"
    info = _info(command, target=march or "the compiler's default", features=features)
    return _build(out, info, command, ".cc", [*command, "-shared", f"-Wl,{name}"])


def build_cuda(out: Path, archs: str = "", extra: Sequence[str] = ()) -> bool:
    """Build the CUDA library for compute capabilities as in "75,80,90+PTX". Return False if it was up to date.

    Default of `archs`: NECKLACE_CUDA_ARCHS, or the capabilities of this machine's GPUs.
    """
    archs = archs or os.environ.get("NECKLACE_CUDA_ARCHS") or gpu_archs()
    if not archs:
        raise BuildError(f"no GPU to build for: set for example NECKLACE_CUDA_ARCHS={ALL_ARCHS}")
    command = [*cuda_compiler(), *NVCC_FLAGS, *arch_flags(archs), *extra]
    return _build(out, _info(command, target=archs), command, ".cu", [*command, "-shared"])


def build_emulated(out: Path, headers: Path) -> bool:
    """Build the CUDA kernels as C++ with emulated CUDA headers, for tests on machines without a GPU."""
    # The emulator switches stacks with longjmp, which its fortified variant reports as an error.
    command = [*compiler(), *CXX_FLAGS, "-U_FORTIFY_SOURCE", f"-I{headers}"]
    return _build(out, _info(command, target="emulated"), [*command, "-x", "c++"], ".cu", [*command, "-shared"])


def build_all() -> Iterator[str]:
    """Build every library that this machine can use. Yield one line per library for the console."""
    yield _report("cpu", build_cpu(library_path("cpu")))
    setting = os.environ.get("NECKLACE_CUDA", "")
    if setting not in ("", "0", "1"):
        raise BuildError(f"NECKLACE_CUDA: expected 0, 1 or nothing, got {setting!r}")
    if setting == "0" or not (setting or os.environ.get("NECKLACE_CUDA_ARCHS") or gpu_archs()):
        return
    try:
        yield _report("cuda", build_cuda(library_path("cuda")))
    except BuildError as error:
        if isinstance(error, NoCompilerError) and not (setting or os.environ.get("NECKLACE_CUDA_ARCHS")):
            yield f"operators for GPUs not built, plain torch is used there: {error}"
        else:
            raise BuildError(f"{error}\nNECKLACE_CUDA=0 builds without the CUDA operators") from error


def _report(kind: str, built: bool) -> str:
    return f"{library_path(kind).relative_to(HERE.parent)}: {'built' if built else 'up to date'}"


def _info(command: Sequence[str], **facts: object) -> str:
    """Return the JSON of nk_build_info. A library with the same JSON is up to date."""
    lines = run([*command, "--version"]).strip().splitlines()
    version = next((line for line in lines if "release" in line), lines[0])
    return json.dumps({"sources": source_hash(), "compiler": version, "flags": " ".join(command[1:]), **facts})


def _build(out: Path, info: str, command: Sequence[str], suffix: str, link: Sequence[str]) -> bool:
    """Compile the sources in parallel, link, and replace the library atomically. Return False if it was up to date."""
    if read_info(out) == json.loads(info):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        about = Path(folder) / f"build_info{suffix}"
        about.write_text(f'#include "necklace.h"\nconst char* nk_build_info(void) {{ return R"json({info})json"; }}\n')
        sources = [*(HERE / FOLDERS[suffix] / f"{stem}{suffix}" for stem in STEMS), about]
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        compile_command = [*command, *include_flags(), "-c"]
        jobs = [[*compile_command, str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(usable_cpus()) as pool:
            list(pool.map(run, jobs))
        linked = Path(folder) / out.name
        run([*link, *map(str, objects), "-o", str(linked)])
        os.replace(linked, out)
    return True


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(command: Sequence[str]) -> str:
    """Run the command and return its stdout; forward its stderr. Raise BuildError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)
    return done.stdout


def failed(what: str, error: BuildError) -> int:
    """Print that the build failed. Return the exit status."""
    print(f"{what}: not built: {error}", file=sys.stderr)
    return NoCompilerError.STATUS if isinstance(error, NoCompilerError) else 1


def succeeded(out: Path, built: bool) -> int:
    """Print whether the library was built or up to date. Return the exit status."""
    print(f"{out}: {'built' if built else 'up to date'}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options] [cpu|cuda]"
    )
    parser.add_argument("kind", nargs="?", choices=["cpu", "cuda"], help="default: all that this machine can use")
    parser.add_argument("--out", type=Path, help="path of the library; default: where it is loaded from")
    parser.add_argument("--archs", default="", help=f"compute capabilities for cuda; all: {ALL_ARCHS}")
    parser.add_argument("--flag", action="append", default=[], help="an extra compiler flag, as in --flag=-g")
    arguments = parser.parse_args()
    try:
        if arguments.kind is None:
            for line in build_all():
                print(line)
            return 0
        out = arguments.out or library_path(arguments.kind)
        if arguments.kind == "cpu":
            built = build_cpu(out, arguments.flag)
        else:
            archs = ALL_ARCHS if arguments.archs == "all" else arguments.archs
            built = build_cuda(out, archs, arguments.flag)
    except BuildError as error:
        return failed(arguments.kind or "operators", error)
    return succeeded(out, built)


if __name__ == "__main__":
    sys.exit(main())
