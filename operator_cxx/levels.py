"""Functions shared by the losses over the levels of a pyramid, which compute their gradient in the forward pass.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def image_scale(operator: str, label: Tensor, normalizer: Tensor | None) -> Tensor:
    """Return the factors (N,) float64 of the images' losses: 1 / normalizer, or 1. label: (N, ...).

    Raises ValueError unless normalizer is None or of shape () or (N,).
    """
    scale = torch.ones(len(label), dtype=torch.float64, device=label.device)
    if normalizer is None:
        return scale
    if normalizer.shape not in ((), scale.shape):
        raise ValueError(f"{operator}: expected normalizer () or ({len(label)},), got {tuple(normalizer.shape)}")
    return scale / normalizer.detach()


def gradients(levels: Sequence[Tensor], wanted: bool) -> list[Tensor]:
    """Return uninitialised tensors of the levels' shapes and memory layouts; an empty list if not `wanted`."""
    return [torch.empty_like(level) for level in levels] if wanted else []


def scaled(grad: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Return the gradients times the gradient of the loss, without a copy if that is known to be 1."""
    # Reading the value synchronises a GPU, and the tensors of a tracer have no value.
    if type(factor) is Tensor and factor.device.type == "cpu" and factor.item() == 1:
        return list(grad)
    return [g * factor.to(g.dtype) for g in grad]


def require_alike(operator: str, levels: Sequence[Tensor], **others: Tensor) -> None:
    """Raise ValueError unless the levels have the same floating-point type and all tensors are on one device."""
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
