"""Run the numeric tests as other processors would: `make portable`, or this file with arguments for pytest.

torch, oneDNN and MKL choose kernels by the processor's instructions, and split sums by the number of threads, so that a
float32 sum is rounded differently from one machine to the next. Each setting below is a pytest process of its own; a
test that fails under one of them leans on the machine on which it was written.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
AVX2_KERNELS = ROOT / "build" / "x86-64-v3" / "necklace_cpu.so"
NUMERIC = [
    "tests/models",
    "tests/symbol",
    "tests/operator_cxx",
    "tests/core/engine",
    "tests/core/distributed/test_average.py",
    "tests/core/weights/test_simpledet_weights.py",
    "tests/core/test_detection_module.py",
    "tests/core/test_inference.py",
]
SETTINGS = {
    "native": {},
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "torch AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "all AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NECKLACE_OPS_LIBRARY": str(AVX2_KERNELS),
    },
}


def run(cores: list[int], setting: dict[str, str], arguments: list[str]) -> int:
    """The exit status of pytest on these cores, with a thread on each."""
    threads = {"OMP_NUM_THREADS": str(len(cores)), "NECKLACE_TEST_THREADS": str(len(cores))}
    threads["OMP_WAIT_POLICY"] = "passive"  # threads that spin would take the cores of the processes under test
    plain = {name: value for name, value in os.environ.items() if not any(name in other for other in SETTINGS.values())}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=plain | {"NECKLACE_OPS": "compiled", "NECKLACE_CUDA": "0"} | threads | setting,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        check=False,
    ).returncode


def main(arguments: list[str]) -> int:
    build = [sys.executable, "operator_cxx/build.py", "cpu", "--out", str(AVX2_KERNELS)]
    subprocess.run(build, cwd=ROOT, env=os.environ | {"NECKLACE_MARCH": "x86-64-v3"}, check=True)
    usable = sorted(os.sched_getaffinity(0))
    rows = []
    for cores in (usable[:1], usable[:2]):
        for name, setting in SETTINGS.items():
            print(f"\n{name}, {len(cores)} of {len(usable)} cores", flush=True)
            began = time.monotonic()
            status = run(cores, setting, arguments or NUMERIC)
            rows.append((name, len(cores), "passed" if status == 0 else f"failed ({status})", time.monotonic() - began))
    print()
    for name, count, outcome, seconds in rows:
        print(f"{name:24}{count} core{'s' if count > 1 else ' '}  {outcome:12}{seconds:6.0f} s")
    return int(any(outcome != "passed" for _, _, outcome, _ in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
