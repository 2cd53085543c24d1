"""Initial weights of a network: from a checkpoint to resume or fine-tune, a pretrained backbone, or random."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from core.weights.checkpoint import Checkpoint, Progress, load_weights
from core.weights.fit import keep_fitting, require_fit
from core.weights.params_file import SUFFIX, read_params
from core.weights.pretrain import find_backbone, load_backbone
from core.weights.simpledet_weights import from_simpledet
from models.backbone.resnet import variant_of
from symbol.ops import Shape

if TYPE_CHECKING:
    from config.schema import Config


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and auxiliary state."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def load_given_weights(path: str | Path) -> tuple[dict[str, Tensor], Progress]:
    """Read parameters and auxiliary states of a checkpoint, ours or MXNet's, and the progress of its run.

    Names and shapes are those of the file; `core.weights.simpledet_weights.from_simpledet` converts SimpleDet's.
    Raises FileNotFoundError for a missing file and ValueError for one that is damaged or no checkpoint.
    """
    path = Path(path)
    return (read_params(path), params_progress(path)) if path.suffix == SUFFIX else load_weights(path)


def params_progress(path: Path) -> Progress:
    """Return the progress of MXNet's run, of which its Module stores the epoch: `<prefix>-<epoch>.params`."""
    match = re.fullmatch(r"(.+)-(\d{4,9})", path.stem)
    return Progress(epoch=int(match[2]) if match else 0, step=0, seed=0, experiment=match[1] if match else path.stem)


def first_weights(
    shapes: Mapping[str, Shape], config: Config, resumed: Checkpoint | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a network that are not initialized at random, by name, and lines for the log.

    shapes: those of every parameter and auxiliary state. `resumed` takes precedence over what the config asks for.
    Raises FileNotFoundError for a missing file and ValueError for one that does not fit.
    """
    model = config.ModelParam
    if resumed is not None:
        tensors, progress = load_weights(resumed.weights)
        require_fit(shapes, tensors, resumed.weights)
        return tensors, [f"resuming {resumed.weights}: epoch {progress.epoch}, step {progress.step}"]
    if model.init_from is not None:
        given, _ = load_given_weights(model.init_from)
        given, lines = from_simpledet(given, shapes, config.NormalizeParam, model.init_from)
        fitting, report = keep_fitting(shapes, given, model.init_from)
        summary = (
            f"fine-tuning {model.init_from}: {len(fitting)} of {len(shapes)} tensors loaded, the others are random"
        )
        return fitting, [*lines, summary, *report.lines()]
    if model.from_scratch:
        return {}, ["training from scratch: every weight is random"]
    variant = variant_of(model.backbone)
    path = find_backbone(model.pretrain.prefix, config.BackboneParam.depth, variant)
    tensors, line = load_backbone(path, shapes, variant)
    return tensors, [line]
