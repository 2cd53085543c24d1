"""Conversion of SimpleDet's weights that differ from ours in name or shape. C channels.

merged BatchNorms: before training or testing, SimpleDet replaces every BatchNorm with fixed statistics that follows a
    convolution by gamma * data + beta, with the statistics in gamma and beta (merge_bn of its utils/graph_optimize.py).
    Its checkpoints have those as (1, C, 1, 1), and neither moving mean nor moving variance.
NAS-FPN: some versions of its models/NASFPN/builder.py name the neck's BatchNorms S1_P4_1_bn, not S1_P4_1_bn_neck.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config.simpledet.names import neck_norm_name

if TYPE_CHECKING:
    from config.schema import NormalizeParam


def from_simpledet(
    tensors: Mapping[str, Tensor], expected: Container[str], normalize: NormalizeParam, path: str | Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors with the names and shapes of our graphs, and lines for the log about the changes.

    Merged BatchNorms get the mean 0 and the variance 1 - eps, with which a fixed BatchNorm is the identity but for the
    merged gamma and beta. Only tensors that the model lacks under their own names are converted: a user's layers may
    have such names and shapes.

    Args:
        tensors: those of the file `path`, by name; not modified.
        expected: the names of the model's parameters and auxiliary states.

    Raises:
        ValueError: BatchNorms are merged, but the config's do not have fixed statistics.
    """
    lines: list[str] = []
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = neck_norm_name(name)
        is_other_spelling = name not in expected and ours in expected and ours not in tensors
        found[ours if is_other_spelling else name] = tensor
    if renamed := [name for name in tensors if name not in found]:
        lines.append(
            f"{path}: {len(renamed)} tensors of the neck's BatchNorms have SimpleDet's names: {renamed[0]} is "
            f"{neck_norm_name(renamed[0])} here"
        )
    merged = _merged_norms(found, expected)
    if not merged:
        return found, lines
    if normalize.type != "fixbn":
        raise ValueError(
            f"{path} was trained by SimpleDet with fixed BatchNorms, which it merges: there are no moving statistics, "
            f"and gamma and beta have the shape (1, C, 1, 1) in {len(merged)} of them, such as {merged[0]}. Expected "
            f"NormalizeParam.type 'fixbn', got '{normalize.type}': set NormalizeParam.type=fixbn"
        )
    for norm in merged:
        for name in (f"{norm}_gamma", f"{norm}_beta"):
            if name in found:
                found[name] = found[name].flatten()
        size = found[f"{norm}_gamma"].shape
        found[f"{norm}_moving_mean"] = torch.zeros(size)
        found[f"{norm}_moving_var"] = torch.full(size, 1 - normalize.eps)
    lines.append(
        f"{path}: SimpleDet merged {len(merged)} fixed BatchNorms; they get the mean 0 and the variance 1 - eps"
    )
    return found, lines


def _merged_norms(found: Mapping[str, Tensor], expected: Container[str]) -> list[str]:
    """Return the names of the BatchNorms that are merged in the file, and whose statistics the model expects."""
    norms = []
    for name, tensor in found.items():
        mean = f"{name.removesuffix('_gamma')}_moving_mean"
        is_merged = name.endswith("_gamma") and tensor.shape == (1, tensor.numel(), 1, 1)
        if is_merged and mean in expected and mean not in found:
            norms.append(name.removesuffix("_gamma"))
    return norms
