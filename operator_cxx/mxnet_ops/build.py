"""Build the operators for MXNet, a library beside the kernel libraries. Run it with the Python that has MXNet.

    .venv-mxnet/bin/python -m operator_cxx.mxnet_ops.build [--archs 75,80] [--out FILE]

A library that is up to date is not rebuilt. With --archs it supports GPUs through necklace_cuda.so, and MXNet must be a
CUDA build. The environment variables are those of operator_cxx/build.py.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

from operator_cxx.build import (
    CXX_FLAGS,
    NVCC_FLAGS,
    BuildError,
    arch_flags,
    compiler,
    cuda_compiler,
    failed,
    include_flags,
    library_path,
    read_info,
    run,
    source_hash,
    succeeded,
)

HERE = Path(__file__).parent


def mxnet_folder() -> Path:
    """Return the folder of the installed MXNet, which contains its headers, without importing it."""
    found = importlib.util.find_spec("mxnet")
    folder = Path(found.origin).parent if found and found.origin else None
    if folder is None or not (folder / "src" / "lib_api.cc").exists():
        raise BuildError("there is no MXNet 1.9 for this Python: make mxnet installs it in .venv-mxnet")
    return folder


def expected_sources() -> str:
    """Return a hash of the binding, the kernels and MXNet's version. A library with another hash is stale."""
    digest = hashlib.sha256((source_hash() + importlib.metadata.version("mxnet")).encode())
    for path in sorted(HERE.iterdir()):
        if path.suffix in (".h", ".cc", ".cu") or path.name == "build.py":
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build(out: Path, archs: str = "") -> bool:
    """Build the library, with CUDA for `archs` as in "75,80,90+PTX". Return False if it was up to date."""
    info = json.dumps({"sources": expected_sources(), "archs": archs})
    if read_info(out) == json.loads(info):
        return False
    mxnet = mxnet_folder()
    cxx = [*compiler(), *CXX_FLAGS]
    cuda = ["-DNK_WITH_CUDA"] if archs else []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        about = Path(folder) / "about.cc"
        linked = Path(folder) / out.name
        about.write_text(
            'extern "C" __attribute__((visibility("default"))) const char* nk_mxnet_build_info() '
            f'{{ return R"json({info})json"; }}\n'
        )
        headers = [*include_flags(), "-isystem", str(mxnet / "include")]
        jobs = [
            [*cxx, *cuda, *headers, "-c", str(HERE / "binding.cc")],
            # MXNet's half of the interface, whose functions must be exported
            [*cxx, "-w", "-fvisibility=default", *headers, "-c", str(mxnet / "src" / "lib_api.cc")],
            [*cxx, "-c", str(about)],
        ]
        if archs:
            nvcc = [*cuda_compiler(), *NVCC_FLAGS, *arch_flags(archs)]
            jobs.append([*nvcc, *include_flags(), "-c", str(HERE / "pointwise.cu")])
        objects = [str(Path(folder) / f"{index}.o") for index in range(len(jobs))]
        for job, target in zip(jobs, objects, strict=True):
            run([*job, "-o", target])
        # libmxnet.so exports functions of the same names: those of this library must be called
        own = "-Wl,-Bsymbolic" if sys.platform != "darwin" else "-Wl,-undefined,error"
        link = [*nvcc, "-shared", f"-Xlinker={own.removeprefix('-Wl,')}"] if archs else [*cxx, "-shared", own]
        run([*link, *objects, "-ldl", "-o", str(linked)])
        os.replace(linked, out)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="", help="compute capabilities, for GPUs")
    parser.add_argument("--out", type=Path, default=library_path("mxnet"))
    arguments = parser.parse_args()
    try:
        built = build(arguments.out, arguments.archs)
    except BuildError as error:
        return failed("operators for MXNet", error)
    return succeeded(arguments.out, built)


if __name__ == "__main__":
    sys.exit(main())
