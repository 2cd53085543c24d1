"""Settings of a SimpleDet file that depend on the overrides or on the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config.image_set import resolve
from config.schema import AnchorGenerate, Config
from config.simpledet.names import neck_norm_name
from config.simpledet.schedule import Iterations
from config.simpledet.transforms import file_transform
from symbol import Symbol


@dataclass
class Translation:
    """A translated config, with the settings that depend on the overrides or on the graph."""

    config: Config
    notes: list[str]
    is_train: bool
    resize: str  # name of the resizing transform
    annotation: str | None  # value of TestParam.coco.annotation
    iterations: Iterations | None  # None in testing
    fixed: tuple[str, ...]  # name patterns of frozen parameters
    excluded: tuple[str, ...]
    memonger_until: str | None
    label_name: Sequence[str]

    def before_check(self, overrides: Sequence[str]) -> None:
        """Set the input size, and epochs from iterations, after the overrides are applied.

        Raises FileNotFoundError if the length of an epoch is unknown.
        """
        overridden = {override.partition("=")[0].strip() for override in overrides}
        self._pad_input()
        self._compare_annotation()
        model = self.config.ModelParam
        if model.memonger and "ModelParam.memonger_until" not in overridden:
            model.memonger_until = self.memonger_until
        if self.iterations is not None:
            self.notes += self.iterations.set_epochs(self.config, overridden)

    def after_derive(self) -> None:
        """Resolve names of parameters, labels and nodes in the training graph. Does nothing in testing."""
        if not self.is_train:
            return
        graph = self.config.ModelParam.train_symbol
        self._fix_parameters(graph)
        self._find_memonger_until(graph)
        unknown = [name for name in self.label_name if name not in graph.list_inputs()]
        if unknown:
            self.notes.append(f"label_name: {', '.join(unknown)} not read: the graph has no such input")

    def _pad_input(self) -> None:
        """Pad sides to the next multiple of the coarsest stride."""
        param, coarsest = self.config.ResizeParam, max(AnchorGenerate().stride)
        fit = (param.short, param.long)
        param.short, param.long = (-(-side // coarsest) * coarsest for side in fit)
        padded = (param.short, param.long)
        if fit != padded:
            self.notes.append(
                f"ResizeParam: images are scaled to fit {fit[0]} x {fit[1]} and padded to {padded[0]} x {padded[1]}, "
                f"multiples of {coarsest}"
            )
        self.config.get_transform = file_transform(self.resize, fit, padded)

    def _compare_annotation(self) -> None:
        data = self.config.DatasetParam
        if self.annotation is None or self.config.TestParam.coco.annotation is not None:
            return
        sets = [resolve(one, data.data_root) for one in data.image_set]
        files = [Path(one.annotation).name for one in sets]
        if Path(self.annotation).name in files:
            return
        bare = [one.name for one, file in zip(sets, files, strict=True) if file.startswith("image_info_")]
        if bare:
            used = (
                f"{bare[0]} has no annotations to compute AP; to compute it --set DatasetParam.image_set=coco_val2017"
            )
        else:
            names = ", ".join(one.name for one in sets)
            used = f"{names} is evaluated with its own; --set TestParam.coco.annotation=FILE selects another file"
        self.notes.append(f"TestParam.coco.annotation {self.annotation!r:.200} is not read: {used}")

    def _fix_parameters(self, graph: Symbol) -> None:
        """Replace patterns by full names where they match otherwise than as prefixes. SimpleDet matches anywhere."""
        model = self.config.ModelParam
        if model.from_scratch or model.pretrain.fixed_param != self.fixed:
            return
        inputs = set(graph.list_inputs())
        names = [name for name in graph.list_arguments() if name not in inputs]
        kept = [name for name in names if _has_one(name, self.fixed) and not _has_one(name, self.excluded)]
        if kept != [name for name in names if name.startswith(self.fixed)]:
            but = f" and none of {', '.join(self.excluded)}" if self.excluded else ""
            self.notes.append(
                f"ModelParam.pretrain.fixed_param: {len(kept)} of {len(names)} parameters are frozen, those with "
                f"one of {', '.join(self.fixed)}{but} anywhere in their names"
            )
            model.pretrain.fixed_param = tuple(kept)

    def _find_memonger_until(self, graph: Symbol) -> None:
        model, until = self.config.ModelParam, self.memonger_until
        if until is None or model.memonger_until != until:
            return
        operators = {node.name for node in graph.nodes() if not node.is_variable}
        model.memonger_until = next((name for name in (until, neck_norm_name(until)) if name in operators), None)
        if model.memonger_until is None:
            self.notes.append(
                f"ModelParam.memonger_until = {until!r:.100} is not read: no operator has this name; "
                "activations are recomputed so as to minimise memory"
            )


def _has_one(name: str, patterns: Sequence[str]) -> bool:
    return any(pattern in name for pattern in patterns)
