"""The versions, the card and the driver, as one line of JSON."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import torch

from operator_cxx.build import usable_cpus
from utils.acceptance.context import ROOT


def environment(device: str) -> dict[str, Any]:
    """Facts that figures depend on."""
    facts: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": _processor(),
        "cores": usable_cpus(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "commit": _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
    }
    if device != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    nvcc = _output(["nvcc", "--version"]) or ""
    facts |= {
        "card": properties.name,
        "cards": torch.cuda.device_count(),
        "memory GiB": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "compute capability": f"{properties.major}.{properties.minor}",
        "driver": (_output(query) or "unknown").splitlines()[0],
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "nvcc": next((line.strip() for line in nvcc.splitlines() if "release" in line), None),
    }
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _output(command: list[str]) -> str | None:
    """Return the output of a command; None where there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    print(json.dumps(environment(sys.argv[1])))
