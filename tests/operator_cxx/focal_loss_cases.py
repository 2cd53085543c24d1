"""Inputs and helpers shared by the tests of focal loss."""

import torch

from operator_cxx import library


def sample(N, K, C, seed=0, dtype=torch.float32):
    """Return random logits (N, K, C) and labels (N, K), with ignored, background and foreground anchors."""
    random = torch.Generator().manual_seed(seed)
    logit = torch.randn(N, K, C, generator=random, dtype=torch.float64) * 4 - 1
    return logit.to(dtype), torch.randint(-1, C + 1, (N, K), generator=random)


def levels_of(logit, sizes, A):
    """Return the maps (N, A*C, H, W) of logits (N, K, C) whose anchors are in the order (level, A, H, W)."""
    parts = logit.split([A * h * w for h, w in sizes], dim=1)
    return [
        part.unflatten(1, (A, h, w)).permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()
        for part, (h, w) in zip(parts, sizes, strict=True)
    ]


def value_and_gradient(loss, *logits):
    """Return the loss and its gradients with respect to all tensors."""
    leaves = [logit.detach().requires_grad_() for logit in logits]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


def by_reference(monkeypatch, loss, *logits):
    """Return value_and_gradient of the same call in plain torch, in float64."""
    with monkeypatch.context() as patch:
        patch.setattr(library, "loaded", {})
        return value_and_gradient(loss, *(logit.double() for logit in logits))
