"""Stage 1: the kernels built for this machine, and loaded."""

from __future__ import annotations

import time

from utils.acceptance.context import Context, python

LOAD = """
import json
from operator_cxx import library
targets = {kind: kernels.info["target"] for kind, kernels in library.loaded.items()}
print(json.dumps({"targets": targets, "notes": library.notes}))
"""


def run(context: Context) -> None:
    kinds = ["cpu"] if context.small else ["cpu", "cuda"]
    for kind in kinds:
        began = time.perf_counter()
        status, printed = context.run(python("operator_cxx/build.py", kind), share=0.9 if kind == kinds[-1] else 0.4)
        took = time.perf_counter() - began
        context.check(f"the {kind} kernels build", status == 0, seconds=took, says=printed.strip()[-300:])
    if context.small:
        context.skip("the cuda kernels build", "there is no GPU to build them for")
    variables = {"NECKLACE_OPS": "compiled"} | ({"NECKLACE_CUDA": "0"} if context.small else {})
    status, printed = context.run(python("-c", LOAD), variables)
    last = printed.strip().splitlines()[-1:] or [""]
    loaded = status == 0 and all(f'"{kind}": ' in last[0] for kind in kinds)
    context.check(f"the {' and '.join(kinds)} kernels load", loaded, says=last[0][-300:])
