"""Helpers for tests of a small training: stop it in a step, and read its log."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from core.engine.trainer import Trainer


def stop_at(
    monkeypatch: pytest.MonkeyPatch, step: int, trainer: type = Trainer, number: signal.Signals = signal.SIGINT
) -> None:
    """Send the process a real signal, by default Ctrl-C's, in the middle of this step."""
    plain = trainer.step  # type: ignore[attr-defined]

    def interrupted(self: Any, batches: list[Any], at: int) -> Any:
        record = plain(self, batches, at)
        if at == step:
            os.kill(os.getpid(), number)
        return record

    monkeypatch.setattr(trainer, "step", interrupted)


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
