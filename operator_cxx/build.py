"""Builds the libraries of kernels, in seconds, with no more than a compiler. Standard library only.

    python3 operator_cxx/build.py                what this machine can use
    python3 operator_cxx/build.py cpu            the library for this machine's processor
    python3 operator_cxx/build.py cuda           the library for this machine's GPUs
    python3 operator_cxx/build.py --help

A library that is up to date stays as it is. Environment:

    CXX, NVCC              the compilers
    NECKLACE_MARCH         the processor to build for: native (default), x86-64-v3 for any with AVX2, or empty for what
                           the compiler takes by itself
    NECKLACE_CUDA          0: without CUDA; 1: with it, or fail; empty: where there are a GPU and nvcc
    NECKLACE_CUDA_ARCHS    the compute capabilities, as in "75,80,90+PTX"; with it no GPU is needed (default: those of
                           this machine's GPUs)
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
ALL_ARCHS = "75,80,86,89,90+PTX"

# Nothing may fuse a product with a sum by itself, or reorder sums: IoUs that are equal must stay equal everywhere.
CXX_FLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -pthread -fopenmp-simd -ffp-contract=off -fno-math-errno "
    "-fno-trapping-math -Wall -Wextra -Wno-unknown-pragmas"
)
NVCC_FLAGS = shlex.split(
    "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra -fmad=false --cudart=static"
)

# What a compiler may use of a processor: its macro, and Linux's name in /proc/cpuinfo.
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
    """A compiler that refused, or a setting that does not fit, with what to do."""


class NoCompilerError(BuildError):
    """There is no compiler. Programs that cannot build for this reason exit with status 3: callers can do without."""

    STATUS = 3


def source_hash() -> str:
    """Of everything that is compiled: a library of another hash is stale."""
    digest = hashlib.sha256()
    for path in sorted(HERE.iterdir()):
        if path.suffix in (".h", ".cc", ".cu", ".cuh", ".pyx") or path.name == "build.py":
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def library_path(kind: str) -> Path:
    """Where the library of a kind, "cpu" or "cuda", is found."""
    return BUILT / f"necklace_{kind}.so"


def read_info(path: Path) -> dict[str, Any]:
    """What a library's nk_build_info answers, read without loading it; empty where there is none."""
    found = re.search(rb'\{"sources": [^\0]*\}', path.read_bytes()) if path.exists() else None
    return json.loads(found.group()) if found else {}


def require_usable(info: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless a library, of this nk_build_info, is of these sources and for a processor like this."""
    if info.get("sources") != source_hash():
        raise ValueError(f"{name} was built from other sources: build it again, make ops")
    missing = sorted(set(info.get("features", ())) - _processor_features(info.get("features", ())))
    if missing:
        raise ValueError(
            f"{name} was built for a processor with {', '.join(missing)}, which this one lacks: build it again on this "
            "machine, make ops, or for both with NECKLACE_MARCH=x86-64-v3 make ops"
        )


def _processor_features(wanted: Sequence[str]) -> set[str]:
    """Those of the features that this processor has; where the system does not tell, all."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return set(flags.group(1).split()) & set(wanted) if flags else set(wanted)


def compiler() -> list[str]:
    """The C++ compiler's command: CXX, which may hold a launcher and flags, or the first that is found."""
    wish = shlex.split(os.environ.get("CXX", ""))
    if wish:
        if shutil.which(wish[0]):
            return wish
        raise BuildError(f"CXX={os.environ['CXX']}: expected a C++ compiler, but there is no {wish[0]}")
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise NoCompilerError("no C++ compiler: install one (Debian: g++; macOS: xcode-select --install) or set CXX")


def cuda_compiler() -> list[str]:
    """nvcc's command."""
    wish = os.environ.get("NVCC")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for name in [wish] if wish else ["nvcc", f"{home}/bin/nvcc"]:
        if found := shutil.which(name):
            return [found]
    raise NoCompilerError("no CUDA compiler: install the CUDA toolkit, or set NVCC or CUDA_HOME")


def gpu_archs() -> str:
    """The compute capabilities of this machine's NVIDIA GPUs, as in "80,90"; empty where there are none."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    found = re.findall(r"^(\d+)\.(\d+)$", done.stdout, re.MULTILINE) if done.returncode == 0 else []
    return ",".join(sorted({major + minor for major, minor in found}, key=int))


def arch_flags(archs: str) -> list[str]:
    """nvcc's flags for compute capabilities as in "75,90+PTX"."""
    flags = []
    for arch in archs.split(","):
        number = arch.removesuffix("+PTX")
        if not re.fullmatch(r"\d+[af]?", number):
            raise BuildError(f'expected compute capabilities as in "75,80,90+PTX", got "{archs}"')
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def build_cpu(out: Path, extra: Sequence[str] = ()) -> bool:
    """The CPU library; `extra` flags for compiling and linking. False where it was up to date."""
    march = os.environ.get("NECKLACE_MARCH", "native")
    command = [*compiler(), *CXX_FLAGS, *([f"-march={march}"] if march else []), *extra]
    macros = run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    features = [name for macro, name in FEATURES.items() if f"#define {macro} " in macros]
    # what links to the library finds it by this name, wherever it was built
    name = f"-install_name,@rpath/{out.name}" if sys.platform == "darwin" else f"-soname,{out.name}"
    info = _info(command, target=march or "the compiler's default", features=features)
    return _build(out, info, command, ".cc", [*command, "-shared", f"-Wl,{name}"])


def build_cuda(out: Path, archs: str = "", extra: Sequence[str] = ()) -> bool:
    """The CUDA library, for compute capabilities as in "75,80,90+PTX" (default: NECKLACE_CUDA_ARCHS, or this machine's
    GPUs). False where it was up to date."""
    archs = archs or os.environ.get("NECKLACE_CUDA_ARCHS") or gpu_archs()
    if not archs:
        raise BuildError(f"no GPU to build for: say which, for example NECKLACE_CUDA_ARCHS={ALL_ARCHS}")
    command = [*cuda_compiler(), *NVCC_FLAGS, *arch_flags(archs), *extra]
    return _build(out, _info(command, target=archs), command, ".cu", [*command, "-shared"])


def build_emulated(out: Path, headers: Path) -> bool:
    """The CUDA kernels as C++, against headers that stand for CUDA's: for tests on machines without a GPU."""
    # setjmp moves between stacks there, which a fortified longjmp takes for an error
    command = [*compiler(), *CXX_FLAGS, "-U_FORTIFY_SOURCE", f"-I{headers}"]
    return _build(out, _info(command, target="emulated"), [*command, "-x", "c++"], ".cu", [*command, "-shared"])


def build_all() -> Iterator[str]:
    """Builds what this machine can use, and says of each library what became of it."""
    yield _report("cpu", build_cpu(library_path("cpu")))
    wish = os.environ.get("NECKLACE_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"NECKLACE_CUDA: expected 0, 1 or nothing, got {wish!r}")
    if wish == "0" or not (wish or os.environ.get("NECKLACE_CUDA_ARCHS") or gpu_archs()):
        return
    try:
        yield _report("cuda", build_cuda(library_path("cuda")))
    except BuildError as error:
        if isinstance(error, NoCompilerError) and not (wish or os.environ.get("NECKLACE_CUDA_ARCHS")):
            yield f"operators for GPUs not built, plain torch serves there: {error}"
        else:
            raise BuildError(f"{error}\nCUDA operators: NECKLACE_CUDA=0 does without them") from error


def _report(kind: str, built: bool) -> str:
    return f"{library_path(kind).relative_to(HERE.parent)}: {'built' if built else 'up to date'}"


def _info(command: Sequence[str], **facts: object) -> str:
    """The answer of nk_build_info. The same again: nothing has changed."""
    first = run([*command, "--version"]).strip().splitlines()
    version = next((line for line in first if "release" in line), first[0])
    return json.dumps({"sources": source_hash(), "compiler": version, "flags": " ".join(command[1:]), **facts})


def _build(out: Path, info: str, command: Sequence[str], suffix: str, link: Sequence[str]) -> bool:
    """Compiles the sources side by side, links, and puts the library in place whole; False where it was up to date."""
    if read_info(out) == json.loads(info):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        about = Path(folder) / f"build_info{suffix}"
        about.write_text(f'#include "necklace.h"\nconst char* nk_build_info(void) {{ return R"json({info})json"; }}\n')
        sources = [*(HERE / f"{stem}{suffix}" for stem in STEMS), about]
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        jobs = [[*command, f"-I{HERE}", "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(usable_cpus()) as pool:
            list(pool.map(run, jobs))
        linked = Path(folder) / out.name
        run([*link, *map(str, objects), "-o", str(linked)])
        os.replace(linked, out)
    return True


def usable_cpus() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(command: Sequence[str]) -> str:
    """What the command prints; its warnings go on to stderr."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)
    return done.stdout


def failed(what: str, error: BuildError) -> int:
    """Says so, and gives the exit status."""
    print(f"{what}: not built: {error}", file=sys.stderr)
    return NoCompilerError.STATUS if isinstance(error, NoCompilerError) else 1


def succeeded(out: Path, built: bool) -> int:
    """Says whether there was anything to do, and gives the exit status."""
    print(f"{out}: {'built' if built else 'up to date'}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options] [cpu|cuda]"
    )
    parser.add_argument("kind", nargs="?", choices=["cpu", "cuda"], help="default: what this machine can use")
    parser.add_argument("--out", type=Path, help="the library to write; default: where it is found when needed")
    parser.add_argument("--archs", default="", help=f"compute capabilities for cuda; all: {ALL_ARCHS}")
    parser.add_argument("--flag", action="append", default=[], help="one more flag, as in --flag=-g")
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
