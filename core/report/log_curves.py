"""Curves of a training run, from its JSON-lines log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


def read_log(path: str | Path) -> tuple[list[Record], list[Record]]:
    """Read the training lines and the evaluation lines of a log, both in the order of their steps.

    A training line has "step" and "cls_loss", an evaluation line "event": "eval", "step" and "AP"; others are
    ignored, and so is an incomplete last line. If the training steps go back, a run was resumed, and the lines
    from that step on are dropped. Raises ValueError for any other line that is not a JSON object and for a log
    without training lines.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    train: list[Record] = []
    evaluations: list[Record] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a JSON object was expected, got {line.strip()[:40]}")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        if record.get("event") == "eval" and {"step", "AP"} <= record.keys():
            evaluations.append(record)
        elif {"step", "cls_loss"} <= record.keys():
            step = record["step"]
            if train and train[-1]["step"] >= step:
                train = [earlier for earlier in train if earlier["step"] < step]
                evaluations = [earlier for earlier in evaluations if earlier["step"] < step]
            train.append(record)
    if not train:
        raise ValueError(f'{path} has no training lines (objects with "step" and "cls_loss")')
    return train, evaluations


def series(records: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values (n,) of the records that have `key`."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T  # (n, 2) -> (2, n)
    return steps, values


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean over a centred window of a fiftieth of the run, shorter at both ends."""
    window = np.ones(2 * (len(values) // 100) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
