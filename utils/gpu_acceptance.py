"""Test and measure Necklace on a GPU, in stages, within a budget of time.

    python3 utils/gpu_acceptance.py --out DIR --budget 540
    python3 utils/gpu_acceptance.py --out DIR --stages 0,3 --device cpu
    python3 utils/gpu_acceptance.py --render DIR/results.jsonl

Needs torch, NumPy, OpenCV, safetensors, pillow, tqdm, pytest, hypothesis and nvcc; the kernels are built first. Every
stage is a process of its own and appends a line to DIR/results.jsonl when it ends; DIR/figures.jsonl has what it found
as it went, DIR/output.txt what it printed. Exit status 0: no stage failed or ran out of time.

`--device cpu` runs in small what can run without a GPU. `--render` writes doc/benchmarks/gpu.md from results, which it
keeps beside the page.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils.acceptance.report import PAGE, publish, render
from utils.acceptance.stages import (
    BUDGET,
    FAILED,
    RESULTS,
    STAGES,
    TIMED_OUT,
    Stage,
    describe_environment,
    run_stages,
    table,
)


def chosen(text: str) -> list[Stage]:
    """The stages that a list such as 0,3 names."""
    known = {str(stage.number): stage for stage in STAGES}
    names = text.split(",") if text else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--stages: expected numbers of {', '.join(known)} with commas between, got {text!r}")
    return [known[name] for name in sorted(set(names), key=int)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Test and measure Necklace on a GPU.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="of all stages together")
    parser.add_argument("--stages", default="", metavar="0,3", help="which (default: all)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--render", nargs="?", type=Path, const=PAGE.with_suffix(".jsonl"), metavar="RESULTS")
    given = parser.parse_args()
    if given.render is not None:
        print(publish(given.render))
        return
    if given.out is None:
        parser.error("expected --out DIR, or --render")
    try:
        stages = chosen(given.stages)
    except ValueError as error:
        parser.error(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    results = given.out / RESULTS
    with results.open("a", encoding="utf-8") as file:
        facts = describe_environment(given.device)
        file.write(json.dumps({"environment": facts, "budget": given.budget}) + "\n")
    with tempfile.TemporaryDirectory() as work:
        lines = run_stages(stages, given.out, Path(work), given.device, given.budget)
    (given.out / PAGE.name).write_text(render(results), encoding="utf-8")
    print(f"\n{table(lines)}")
    sys.exit(any(line["status"] in (FAILED, TIMED_OUT) for line in lines))


if __name__ == "__main__":
    main()
