"""BatchNorm over the batches of all processes. torch's SyncBatchNorm needs a GPU and moves an unbiased variance.

N images of this process (perhaps none), C channels, H x W pixels; n pixels of a channel in this process, N * H * W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from symbol.torch_backend.nn import batch_norm
from symbol.torch_backend.registry import lowers
from symbol.torch_backend.segment import once, recomputing


@lowers("_contrib_SyncBatchNorm", refuses=lambda attrs: attrs["output_mean_var"], only="without output_mean_var")
def sync_batch_norm(
    data: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_var: Tensor,
    training: bool,
    *,
    eps: float,
    momentum: float,
    fix_gamma: bool,
    use_global_stats: bool,
    **_: Any,
) -> Tensor:
    """Normalize by the mean and biased variance of all processes' pixels, which also move the moving statistics.

    Every process of the default group takes part, also without images: in training all must call this for the same
    layers in the same order. A recomputation reuses the statistics of the first pass, without communication.
    The attribute ndev is not read; a single process computes `batch_norm`.
    The gradients of gamma and beta are those of this process's pixels: summed over the processes they are the batch's.
    """
    if not training or use_global_stats or not _has_others():
        return batch_norm(
            *(data, gamma, beta, moving_mean, moving_var, training),
            eps=eps,
            momentum=momentum,
            fix_gamma=fix_gamma,
            use_global_stats=use_global_stats,
        )
    if fix_gamma:
        gamma = torch.ones_like(gamma)
    count, mean, variance = once(lambda: _statistics(data.detach()))
    if not recomputing():
        with torch.no_grad():
            moving_mean.lerp_(torch.where(count > 0, mean, moving_mean), 1 - momentum)
            moving_var.lerp_(torch.where(count > 0, variance, moving_var), 1 - momentum)
    out: Tensor = _Normalize.apply(data, gamma, beta, count, mean, variance, eps)
    return out


def _has_others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _statistics(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixel count of all processes (), their mean (C,) and biased variance (C,), float32 for float16 data.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    C = data.shape[1]
    dtype = torch.promote_types(data.dtype, torch.float32)
    own = data.new_zeros(1 + 2 * C, dtype=torch.float64)  # n, means, variances
    if data.numel():
        unused = torch.zeros(2, C, dtype=dtype, device=data.device)  # moving statistics, whose type is the result's
        own[0] = data.numel() // C
        own[1:] = torch.cat(torch.batch_norm_update_stats(data, unused[0], unused[1], 0.0))
    every = own.new_empty(dist.get_world_size(), 1 + 2 * C)
    dist.all_gather(list(every), own)  # into the rows
    n, means, variances = every.split([1, C, C], dim=1)  # (processes, 1), (processes, C), (processes, C)
    share = n / n.sum().clamp(min=1)
    mean = (share * means).sum(dim=0)
    variance = (share * (variances + (means - mean).square())).sum(dim=0)
    return n.sum(), mean.to(dtype), variance.to(dtype)


class _Normalize(torch.autograd.Function):
    """(data - mean) / sqrt(variance + eps) * gamma + beta, where mean and variance are those of all processes' data."""

    @staticmethod
    def forward(
        ctx: Any, data: Tensor, gamma: Tensor, beta: Tensor, count: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(data, gamma, count, mean, variance)
        ctx.eps = eps
        return F.batch_norm(data, mean, variance, gamma, beta, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Ioffe and Szegedy 2015, section 3: the terms of mean and variance need the sums over all processes."""
        data, gamma, count, mean, variance = ctx.saved_tensors
        # as if mean and variance were constants
        if data.numel():
            grad_data, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
                grad, data, gamma, mean, variance, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            grad_data, grad_gamma, grad_beta = grad, torch.zeros_like(gamma), torch.zeros_like(gamma)
        if ctx.needs_input_grad[0]:
            total = torch.stack([grad_gamma, grad_beta])  # a copy: the sums over this process alone are returned
            dist.all_reduce(total)
            # d data -= gamma / std / count * (normalized data * total grad_gamma + total grad_beta)
            factor = -gamma * (variance + ctx.eps).rsqrt() / count.clamp(min=1).to(gamma.dtype)
            weight, bias = (total * factor).unbind()
            grad_data = grad_data + F.batch_norm(data, mean, variance, weight, bias, False, 0.0, ctx.eps)
        return grad_data, grad_gamma, grad_beta, None, None, None, None
