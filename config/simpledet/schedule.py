"""Conversion of SimpleDet's schedule, in iterations, to epochs, which do not depend on the number of devices."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from config.image_set import PUBLISHED, ImageSet, resolve
from config.schema import Config

_LR, _WARMUP = "OptimizeParam.schedule.lr_epoch", "OptimizeParam.warmup.epoch"
_END = "OptimizeParam.schedule.end_epoch"


@dataclass(frozen=True)
class Iterations:
    """OptimizeParam.schedule.lr_iter and warmup.iter, in steps of `images` images."""

    lr: tuple[int, ...]  # negative: counted from the end
    warmup: int
    images: int

    def set_epochs(self, config: Config, overridden: Container[str]) -> list[str]:
        """Set the equivalent epochs, except for `overridden` fields, and return notes on them.

        Raises FileNotFoundError if the annotations of the image sets, which give the epoch length, do not exist.
        """
        schedule, notes = config.OptimizeParam.schedule, []
        if not config.DatasetParam.flip and _END not in overridden:
            notes.append(
                f"{_END}: an epoch contains every image twice in SimpleDet, but once here if none is flipped: "
                f"{schedule.end_epoch} epochs are {2 * schedule.end_epoch} here"
            )
            schedule.end_epoch *= 2
        counted = [key for key in (_LR, _WARMUP) if key not in overridden]
        if not counted:
            return notes
        iter_per_epoch = -(-_num_sample(config) // self.images)
        setters = {_LR: self._set_milestones, _WARMUP: self._set_warmup}
        done = [setters[key](config, iter_per_epoch) for key in counted]
        notes += [note for note, _ in done]
        if not all(fits for _, fits in done):
            notes.append(
                f"these iterations do not fit the training: set epochs with {_advice(schedule.end_epoch, counted)}"
            )
        return notes

    def _set_milestones(self, config: Config, iter_per_epoch: int) -> tuple[str, bool]:
        """Set lr_epoch; return a note, and whether all steps are within the training."""
        schedule = config.OptimizeParam.schedule
        end = schedule.end_epoch * iter_per_epoch
        milestones = [step + end if step < 0 else step for step in self.lr]
        reached = [step for step in milestones if 0 < step < end]
        schedule.lr_epoch = tuple(step / iter_per_epoch for step in reached)
        shown = [f"{step} is epoch {step / iter_per_epoch:.4g}" for step in reached]
        late = [f"{step} is after the end" for step in milestones if step >= end]
        note = (
            f"OptimizeParam.schedule.lr_iter, at {self.images} images per step and {iter_per_epoch} steps per epoch: "
            f"{', '.join(shown + late) or 'none'}"
        )
        return note, not late

    def _set_warmup(self, config: Config, iter_per_epoch: int) -> tuple[str, bool]:
        """Set warmup.epoch; return a note, and whether the warm-up ends in time."""
        schedule, epoch = config.OptimizeParam.schedule, self.warmup / iter_per_epoch
        limit = min([*schedule.lr_epoch, float(schedule.end_epoch)])
        config.OptimizeParam.warmup.epoch = min(epoch, limit)
        cut = f", cut to {limit:.4g}" if epoch > limit else ""
        note = f"OptimizeParam.warmup.iter, at {self.images} images per step: {self.warmup} is epoch {epoch:.4g}{cut}"
        return note, not cut


def _advice(end_epoch: int, keys: Sequence[str] = (_LR, _WARMUP)) -> str:
    """Return overrides for these keys, with the fractions of the published recipes."""
    values = {_LR: f"{0.6 * end_epoch:g},{0.8 * end_epoch:g}", _WARMUP: f"{0.04 * end_epoch:g}"}
    return " ".join(f"--set {key}={values[key]}" for key in keys)


def _num_sample(config: Config) -> int:
    """Return the number of samples per epoch."""
    data = config.DatasetParam
    images = sum(_num_image(one, data.data_root, config.OptimizeParam.schedule.end_epoch) for one in data.image_set)
    return images * (2 if data.flip else 1)


def _num_image(image_set: str | ImageSet, data_root: str, end_epoch: int) -> int:
    """Return the number of images with at least one box to train on."""
    resolved = resolve(image_set, data_root)
    published = PUBLISHED.get(image_set) if isinstance(image_set, str) else None
    if published is not None and not Path(resolved.annotation).is_file():
        return published.num_image
    if not Path(resolved.annotation).is_file():
        raise FileNotFoundError(
            f"OptimizeParam.schedule.lr_iter: the number of iterations per epoch of {resolved.name} is unknown, as "
            f"{resolved.annotation} does not exist; set --data-root, or set epochs with {_advice(end_epoch)}"
        )
    from core.data.coco_index import open_index
    from core.data.dataset import DetectionDataset

    return DetectionDataset([open_index(resolved)], []).num_image
