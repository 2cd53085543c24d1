"""A trained detector on disk: where its weights lie, and the config to use them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config.description import Description, differences, restore
from config.section import fill
from core.report.train_log import best_scores
from core.run.experiment import experiment_folder
from core.weights.checkpoint import Progress, find_weights, read_description, read_metadata, refuse_state
from core.weights.first_weights import load_given_weights
from core.weights.params_file import SUFFIX
from core.weights.simpledet_weights import from_simpledet

if TYPE_CHECKING:
    from config.schema import Config


@dataclass
class Trained:
    """A checkpoint and the complete config for testing it."""

    path: Path  # of the weights
    config: Config
    description: Description | None  # None: written without one, so that the config file is needed
    notes: list[str] = field(default_factory=list)  # lines to print

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return experiment_folder(self.config)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes 1..K; their numbers if the checkpoint has no names."""
        if self.description is not None:
            return self.description.class_names
        count = (self.config.RpnParam.num_class or 1) - 1
        return self.config.DatasetParam.class_names or tuple(f"class {number}" for number in range(1, count + 1))

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The category ids of the classes 1..K in the data set that the detector was trained on, or 1..K."""
        if self.description is not None:
            return self.description.category_ids
        return tuple(range(1, len(self.class_names) + 1))

    def provenance(self) -> dict[str, str]:
        """Return where the detector comes from, as names and texts: for reports, model cards and exported files."""
        facts = {"checkpoint": self.path.name}
        if self.path.suffix != SUFFIX:
            progress = Progress.from_metadata(read_metadata(self.path), self.path)
            facts["trained for"] = f"{progress.epochs:g} epochs, {progress.step} steps, seed {progress.seed}"
        if self.description is not None:
            facts["config"] = self.description.config
            for one in self.description.train_sets:
                shown = f"{one.images} images, {one.boxes} boxes, annotations with SHA-256 {one.sha256}"
                facts[f"trained on {one.name}"] = shown
            facts["versions"] = ", ".join(f"{name} {version}" for name, version in self.description.versions.items())
        resize = self.config.ResizeParam
        facts["input"] = f"{resize.short} x {resize.long} pixels, mean {self.config.NormParam.mean}, std "
        facts["input"] += str(self.config.NormParam.std)
        facts["classes"] = f"{len(self.class_names)}: {', '.join(self.class_names)}"
        best = best_scores(self.path.parent)
        if best is not None:
            facts["best AP while training"] = f"{best['AP']:.3f} after epoch {best['epoch']}"
        return facts

    def weights(self) -> tuple[dict[str, Tensor], Progress, list[str]]:
        """Return parameters and auxiliary states by name, the progress of their run, and lines to print.

        Raises ValueError for a file that is damaged or was trained on other classes than the config's.
        """
        weights, progress = load_given_weights(self.path)
        graph = self.config.ModelParam.test_symbol
        expected = {*graph.list_arguments(), *graph.list_auxiliary_states()}
        weights, lines = from_simpledet(weights, expected, self.config.NormalizeParam, self.path)
        return weights, progress, lines


def find_trained(
    source: str | Path | None = None,
    config: Config | None = None,
    *,
    overrides: Sequence[str] = (),
    epoch: int | None = None,
    allow_mismatch: bool = False,
) -> Trained:
    """Return a checkpoint with the config to test it with.

    source: an experiment's folder, or one checkpoint file; None: the folder of `config`.
    config: for testing; None: restored from the checkpoint, with `overrides` applied. Its devices are then the GPUs of
        this machine, or its CPU, unless an override names them.
    epoch: the checkpoint after that many epochs; None: the newest.

    Raises FileNotFoundError if there is no checkpoint, and ValueError: for one without a description of its detector
    where no config is given; for overrides, as `config.description.restore` does; and if the weights mean something
    else under the config (anchors, normalization of images, order of classes), unless `allow_mismatch` is set.
    """
    if source is None:
        assert config is not None
        source = experiment_folder(config)
    elif not Path(source).exists():
        raise FileNotFoundError(
            f"{source} does not exist: expected the folder of an experiment, such as experiments/NAME, or a checkpoint"
        )
    source = Path(source)
    path = source if source.is_file() else find_weights(source, epoch)
    refuse_state(path)
    description = None if path.suffix == SUFFIX else read_description(path)
    if config is None:
        config = _restored(path, description, overrides)
    return Trained(path, config, description, _compare(description, config, path, allow_mismatch))


def _restored(path: Path, description: Description | None, overrides: Sequence[str]) -> Config:
    if description is None:
        raise ValueError(
            f"{path} holds weights without the description of their detector, as MXNet and earlier versions of this "
            "program write them: give the config file that they were trained with as well (--config)"
        )
    gpus = ",".join(map(str, range(torch.cuda.device_count()))) or "cpu"
    config = restore(description, [f"KvstoreParam.gpus={gpus}", *overrides])
    config.General.name = path.resolve().parent.name
    fill(config.TestParam.model, "prefix", str(path.parent / "checkpoint"))
    return config


def _compare(description: Description | None, config: Config, path: Path, allow_mismatch: bool) -> list[str]:
    """Return a line for each setting that differs from those that a checkpoint was trained with."""
    found = [] if description is None else differences(description, config)
    wrong = [f"  {one}" for one in found if one.is_meaningless]
    if wrong and not allow_mismatch:
        raise ValueError(
            f"{path} means something else under these settings:\n"
            + "\n".join(wrong)
            + "\nTest with the settings that it was trained with (--experiment DIR needs no config), or add "
            "--allow-mismatch"
        )
    return [f"differs: {one}" for one in found]
