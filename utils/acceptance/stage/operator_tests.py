"""Stage 2: the operators' tests on the device's kernels."""

from __future__ import annotations

import re

from utils.acceptance.context import ROOT, Context, python

SMALL = ("test_smooth_l1.py",)


def run(context: Context) -> None:
    on = "compiled" if context.small else "cuda"
    folder = ROOT / "tests" / "operator_cxx"
    # those with the fixture `device`, whose implementations are a part of the tests' names
    files = [path for path in sorted(folder.glob("test_*.py")) if re.search(r"\bdevice\b[,)]", path.read_text())]
    files = [path for path in files if path.name in SMALL] if context.small else files
    command = python("-m", "pytest", "-rfE", "--tb=short", "-k", on, "--durations=5", *map(str, files))
    variables = {"NECKLACE_OPS": "compiled", "OMP_NUM_THREADS": "1"}
    status, printed = context.run(command, variables | ({"NECKLACE_CUDA": "0"} if context.small else {}))
    print(printed)
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", printed)}
    for name, why in re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", printed, re.MULTILINE)[:40]:
        context.record("tests that fail", test=name.removeprefix("tests/operator_cxx/"), error=why[:200])
    passed = status == 0 and counts.get("passed", 0) > 0
    what = f"the operators' tests on {on}"
    context.check(what if status is not None else f"{what}, in time", passed, files=len(files), **counts)
