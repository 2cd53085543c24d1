"""A stage as a process.

python3 -m utils.acceptance utils.acceptance.stage.machine --stage 0 --device cuda --out DIR --work DIR --deadline T
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from utils.acceptance.context import Context


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one stage of the GPU acceptance.")
    parser.add_argument("module")
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="by time.monotonic, which processes share")
    given = parser.parse_args()
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    context = Context(given.stage, device, given.out, given.work, given.deadline)
    importlib.import_module(given.module).run(context)
    if context.failures:
        sys.exit(f"{len(context.failures)} checks do not hold: {'; '.join(context.failures)}")


if __name__ == "__main__":
    main()
