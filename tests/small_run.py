"""What the tests of a small training do with it: stop it in a step, and read its log."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from core.trainer import Trainer


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, trainer: type = Trainer) -> None:
    """The process gets a real SIGINT in the middle of this step."""
    plain = trainer.step  # type: ignore[attr-defined]

    def interrupted(self: Any, batches: list[Any], number: int) -> Any:
        record = plain(self, batches, number)
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)
        return record

    monkeypatch.setattr(trainer, "step", interrupted)


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
