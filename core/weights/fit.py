"""Fit of a file's tensors to a model: by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class FitReport:
    """Differences between the tensors of a file and those that a model expects."""

    missing: tuple[str, ...]  # expected, not given
    extra: tuple[str, ...]  # given, not expected
    different: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, expected shape, given shape

    @property
    def fits(self) -> bool:
        return not (self.missing or self.extra or self.different)

    def lines(self, most: int = 8) -> list[str]:
        """Return one line per kind of difference, with at most `most` names each."""
        shapes = [f"{name} (expected {expected}, got {got})" for name, expected, got in self.different]
        kinds = (("missing", self.missing), ("not expected", self.extra), ("of another shape", shapes))
        return [
            f"{len(names)} {kind}: {', '.join(names[:most])}{', ...' if len(names) > most else ''}"
            for kind, names in kinds
            if names
        ]


def check_fit(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> FitReport:
    """Compare names and shapes; `expected` maps every parameter and auxiliary state to its shape."""
    return FitReport(
        missing=tuple(name for name in expected if name not in given),
        extra=tuple(name for name in given if name not in expected),
        different=tuple(
            (name, tuple(shape), tuple(given[name].shape))
            for name, shape in expected.items()
            if name in given and tuple(given[name].shape) != tuple(shape)
        ),
    )


def require_fit(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise ValueError unless the tensors have exactly the model's names and shapes.

    The message lists the first differences of each kind.
    """
    report = check_fit(expected, given)
    if not report.fits:
        differences = "\n  ".join(report.lines())
        raise ValueError(
            f"the weights in {path} do not fit this model:\n  {differences}\nUse the config that they were "
            f"trained with, or fine-tune from the tensors that fit with --set ModelParam.init_from={path}"
        )


def keep_fitting(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], path: str | Path
) -> tuple[dict[str, Tensor], FitReport]:
    """Return the tensors that fit by name and shape, for fine-tuning, and a report of the differences, for the log.

    Raises:
        ValueError: nothing fits.
    """
    report = check_fit(expected, given)
    left_out = {*report.extra, *(name for name, _, _ in report.different)}
    kept = {name: tensor for name, tensor in given.items() if name not in left_out}
    if not kept:
        raise ValueError(f"ModelParam.init_from: no tensor of {path} fits this model by name and shape")
    return kept, report
