"""Maps of a level as the kernels take them, and what the losses share: a gradient made in the forward pass.

Shapes: N images, R channels, H x W cells, P = H * W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flat(level: Tensor) -> Tensor:
    """(N, R, P) of a map (N, R, H, W) or (N, R, P): a view of a contiguous or channels-last one, else a copy."""
    return level.flatten(2)


def image_scale(operator: str, label: Tensor, normalizer: Tensor | None) -> Tensor:
    """(N,) float64, what the terms of each image of `label` (N, ...) are multiplied by: 1 / normalizer, or 1.

    Raises ValueError unless normalizer is None, () or (N,).
    """
    scale = torch.ones(len(label), dtype=torch.float64, device=label.device)
    if normalizer is None:
        return scale
    if normalizer.shape not in ((), scale.shape):
        raise ValueError(f"{operator}: expected normalizer () or ({len(label)},), got {tuple(normalizer.shape)}")
    return scale / normalizer.detach()


def gradients(levels: Sequence[Tensor], wanted: bool) -> list[Tensor]:
    """Uninitialised tensors of the levels' shapes and memory layouts; none if not wanted."""
    return [torch.empty_like(level) for level in levels] if wanted else []


def scaled(grad: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """The gradients times the scalar that arrived from above: without a copy where that is known to be 1."""
    # Only a CPU can look without waiting, and only at a real tensor: a tracer's has no value.
    if type(factor) is Tensor and factor.device.type == "cpu" and factor.item() == 1:
        return list(grad)
    return [g * factor.to(g.dtype) for g in grad]


def require_alike(operator: str, levels: Sequence[Tensor], **others: Tensor) -> None:
    """Raise ValueError unless the levels have one floating-point type and all tensors are on one device."""
    dtypes = {level.dtype for level in levels}
    if len(dtypes) != 1 or not levels[0].is_floating_point():
        found = ", ".join(sorted(map(str, dtypes))) or "none"
        raise ValueError(f"{operator}: expected levels of one floating-point type, got {found}")
    devices = {level.device for level in levels} | {other.device for other in others.values()}
    if len(devices) != 1:
        raise ValueError(
            f"{operator}: expected the levels, {' and '.join(others)} on one device, "
            f"got {', '.join(sorted(map(str, devices)))}"
        )
