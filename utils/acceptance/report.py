"""The page doc/benchmarks/gpu.md from lines of results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.acceptance.context import FIGURES, ROOT

PAGE = ROOT / "doc" / "benchmarks" / "gpu.md"
COMMAND = "python3 utils/gpu_acceptance.py --out DIR --budget 540"
INTRODUCTION = f"""# Measured on a GPU

`{COMMAND}` tests and measures Necklace on a GPU;
`python3 utils/gpu_acceptance.py --render DIR/results.jsonl` writes this page from what it found.
"""
NOTHING = """
No GPU has run it yet: nothing here is measured. The networks, the operators and the training have run on CPUs
([cpu.md](cpu.md)), the CUDA kernels on an emulation of CUDA ([operators.md](operators.md)).
"""
SMALL = """
**This was a run on a CPU, in small, which holds the program together. No GPU has run it, and its figures say
nothing of one.**
"""
WRITTEN = "Measured by `gpu_acceptance.py`. A check with `no` does not hold."


def publish(results: Path) -> Path:
    """Write PAGE from results, which are kept beside it; without any it says that no GPU has run yet."""
    kept = PAGE.with_suffix(".jsonl")
    if results.exists() and results.resolve() != kept.resolve():
        shutil.copyfile(results, kept)
    elif results.resolve() != kept.resolve():
        raise SystemExit(f"error: no file {results}: give the results.jsonl of a run, or --render alone")
    PAGE.write_text(render(kept), encoding="utf-8")
    return PAGE


def render(results: Path) -> str:
    """The page of a file of results: the last run of each stage counts, and what a stage had written when the run was
    cut off."""
    environment, stages = _read(results)
    if environment is None:
        return INTRODUCTION + NOTHING
    small = SMALL if environment.get("device") == "cpu" else ""
    parts = [INTRODUCTION + small, *_environment(environment), "## Stages\n", _stage_table(stages)]
    for line in stages:
        parts += [f"## {line['stage']}: {line['name']}\n", *_stage(line)]
    return "\n".join(parts)


def _read(results: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    environment: dict[str, Any] | None = None
    stages: dict[int, dict[str, Any]] = {}
    for line in _lines(results):
        if "environment" in line:
            environment = line["environment"]
        else:
            stages[line["stage"]] = line
    cut_off: dict[int, dict[str, Any]] = {}
    unknown = {"name": "cut off", "status": "cut off", "seconds": 0.0, "error": ""}
    for row in _lines(results.with_name(FIGURES)):
        number = row.pop("stage")
        if number not in stages:
            cut_off.setdefault(number, {**unknown, "stage": number, "figures": []})["figures"].append(row)
    stages |= cut_off
    return environment, [stages[number] for number in sorted(stages)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of JSON; one that was cut off in the middle is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _environment(environment: dict[str, Any]) -> Iterator[str]:
    card = environment.get("card") or environment.get("processor") or "unknown"
    yield f"## {card}\n"
    yield WRITTEN + "\n"
    shown = ", ".join(f"{name} {value}" for name, value in environment.items() if value is not None and name != "card")
    yield f"{shown}.\n"


def _stage_table(stages: Sequence[dict[str, Any]]) -> str:
    names = {"stage": "stage", "name": "what", "status": "status", "seconds": "seconds"}
    return _table([{title: one[key] for key, title in names.items()} for one in stages])


def _stage(line: dict[str, Any]) -> Iterator[str]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in line["figures"]:
        kinds.setdefault(row["kind"], []).append({key: value for key, value in row.items() if key != "kind"})
    kinds.pop("environment", None)  # it stands on top
    if line["status"] not in ("passed", "not on this device"):
        yield f"This stage: {line['status']}.\n"
    for kind, rows in kinds.items():
        yield f"### {kind[:1].upper()}{kind[1:]}\n"
        yield _table([_with_details(row) for row in rows] if kind == "checks" else rows)
    if not kinds:
        yield "Nothing was recorded.\n"


def _with_details(check: dict[str, Any]) -> dict[str, Any]:
    """A check with its values in one cell: every check has others."""
    values = {
        key: value for key, value in check.items() if key not in ("what", "holds") and value not in (None, [], "")
    }
    details = ", ".join(f"{key.replace('_', ' ')} {_cell(value)}" for key, value in values.items())
    return {"what": check["what"], "holds": check["holds"], "details": details}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table with a column for each key that any of them has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(column.replace("_", " ") for column in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        value = int(value)
    return " ".join(str(value).replace("|", "\\|").split())
