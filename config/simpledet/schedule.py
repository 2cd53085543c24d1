"""SimpleDet counts its schedule in iterations; ours is in epochs, whatever the number of devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config.schema import Config
from core.image_set import PUBLISHED, ImageSet, resolve

_LR, _WARMUP = "OptimizeParam.schedule.lr_epoch", "OptimizeParam.warmup.epoch"


@dataclass(frozen=True)
class Iterations:
    """OptimizeParam.schedule.lr_iter and warmup.iter, of steps of `images` images."""

    lr: tuple[int, ...]  # below 0: counted from the end
    warmup: int
    images: int

    def set_epochs(self, config: Config, overrides: Sequence[str]) -> list[str]:
        """Sets the epochs at which these iterations are, but for those that the overrides set; returns notes.

        Raises FileNotFoundError where the image sets' annotations, which tell the length of an epoch, do not exist.
        """
        overridden = {override.partition("=")[0].strip() for override in overrides}
        schedule, warmup = config.OptimizeParam.schedule, config.OptimizeParam.warmup
        if {_LR, _WARMUP} <= overridden:
            return []
        iter_per_epoch = -(-_num_sample(config) // self.images)
        end = schedule.end_epoch * iter_per_epoch
        milestones = [step + end if step < 0 else step for step in self.lr]
        reached = [step for step in milestones if 0 < step < end]
        notes = []
        if _LR not in overridden:
            schedule.lr_epoch = tuple(step / iter_per_epoch for step in reached)
            shown = [f"{step} is epoch {step / iter_per_epoch:.4g}" for step in reached]
            late = [f"{step} is after the end" for step in milestones if step >= end]
            notes.append(
                f"OptimizeParam.schedule.lr_iter of {iter_per_epoch} iterations an epoch: "
                f"{', '.join(shown + late) or 'none'}"
            )
        if _WARMUP not in overridden:
            limit = min([*schedule.lr_epoch, float(schedule.end_epoch)])
            warmup.epoch = min(self.warmup / iter_per_epoch, limit)
            cut = f", cut to {limit:.4g}" if self.warmup / iter_per_epoch > limit else ""
            notes.append(f"OptimizeParam.warmup.iter {self.warmup} is epoch {self.warmup / iter_per_epoch:.4g}{cut}")
        return notes


def _num_sample(config: Config) -> int:
    """Samples of an epoch."""
    data = config.DatasetParam
    images = sum(_num_image(one, data.data_root, config.OptimizeParam.schedule.end_epoch) for one in data.image_set)
    return images * (2 if data.flip else 1)


def _num_image(image_set: str | ImageSet, data_root: str, end_epoch: int) -> int:
    """Images with a box to train on."""
    resolved = resolve(image_set, data_root)
    published = PUBLISHED.get(image_set) if isinstance(image_set, str) else None
    if published is not None and not Path(resolved.annotation).is_file():
        return published.num_image
    if not Path(resolved.annotation).is_file():
        raise FileNotFoundError(
            f"OptimizeParam.schedule.lr_iter: how many iterations an epoch of {resolved.name} has is not known, as "
            f"{resolved.annotation} does not exist; name the data with --data-root, or give epochs: "
            f"--set {_LR}={0.6 * end_epoch:g},{0.8 * end_epoch:g} --set {_WARMUP}={min(1, 0.6 * end_epoch):g}"
        )
    from core.coco_index import open_index
    from core.dataset import DetectionDataset

    return DetectionDataset([open_index(resolved)], []).num_image
