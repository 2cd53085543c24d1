"""The folder of a run, `<output_root>/<name>`: may this run start here, and from where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from core.checkpoint import Checkpoint, latest

if TYPE_CHECKING:
    from config.schema import Config

CONFIG_FILE = "config.txt"


def experiment_folder(config: Config) -> Path:
    return Path(config.TestParam.model.prefix).parent


def find_start(config: Config, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from; None for the first step. Nothing is written.

    Raises ValueError where the folder holds a finished run, or an unfinished one that `resume` does not ask for.
    """
    folder = experiment_folder(config)
    newest = latest(folder) if folder.is_dir() else None
    if newest is None:
        return None
    end_epoch = config.OptimizeParam.schedule.end_epoch
    anew = "train under another name (--set General.name=...) or remove the folder"
    if newest.is_finished(end_epoch):
        raise ValueError(
            f"{folder} holds a finished run ({newest.progress.epoch} epochs): {anew}; to train on, add --resume and "
            "a larger OptimizeParam.schedule.end_epoch"
        )
    if not resume:
        raise ValueError(
            f"{folder} holds a run that is not finished (epoch {newest.progress.epoch} of {end_epoch}, step "
            f"{newest.progress.step}): add --resume to go on with it, {anew}"
        )
    return newest


def store_config(config: Config, text: str) -> list[str]:
    """Write the resolved config into the folder (which is made), and say what differs from the one that lay there."""
    folder = experiment_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    path.write_text(text, encoding="utf-8")
    if not before:
        return []
    old = [line for line in before if line not in text.splitlines()]
    new = [line for line in text.splitlines() if line not in before]
    return [f"config was: {line}" for line in old] + [f"config is: {line}" for line in new]
