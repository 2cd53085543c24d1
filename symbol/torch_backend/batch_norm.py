"""Batch normalization over the batch of one process or of all of them, with the residual and the ReLU behind it.

N images of this process (perhaps none), C channels, H x W pixels; n pixels of a channel in this process, N * H * W.
torch's own SyncBatchNorm needs a GPU and moves an unbiased variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from symbol.torch_backend.elementwise import require_one_shape
from symbol.torch_backend.registry import lowers
from symbol.torch_backend.segment import once

Moved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, float, float, bool]


@lowers("_batch_norm")
def batch_norm(
    data: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *rest: Any,
    eps: float,
    fix_gamma: bool,
    use_global_stats: bool,
    sync: bool,
    relu: bool,
    no_bias: bool,
    no_residual: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return relu(normalized data + residual), and statistics (C,) for `move_statistics`: the mean, and the inverse
    standard deviation 1 / sqrt(variance + eps), over several processes the biased variance itself.

    rest: the bias (C,) of the convolution before, unless no_bias; a residual of the data's shape, unless no_residual;
    moving_mean and moving_var (C,); whether the network trains.

    sync: normalize by the statistics of all processes' pixels. Every process of the default group takes part, also
    without images: in training all must call this for the same layers in the same order. The gradients of gamma and
    beta are those of this process's pixels: summed over the processes they are the batch's.

    A recomputation reuses the statistics of the first pass. Source: Ioffe and Szegedy 2015.
    """
    *optional, moving_mean, moving_var, training = rest
    bias = None if no_bias else optional[0]
    residual = None if no_residual else optional[-1]
    if residual is not None:
        require_one_shape(data, residual)
    if fix_gamma:
        gamma = torch.ones_like(gamma)
    sync = _spans_processes(sync)
    if not training or use_global_stats or (data.shape[0] == 0 and not sync):
        if bias is not None:
            beta = beta + bias * gamma * (moving_var + eps).rsqrt()
        out = F.batch_norm(data, moving_mean, moving_var, gamma, beta, False, 0.0, eps)
        return _residual_relu(out, residual, relu), moving_mean, moving_var
    out, mean, variance = _normalize(data, gamma, beta, (moving_mean, moving_var), eps, sync)
    return _residual_relu(out, residual, relu), mean, variance


def _spans_processes(sync: bool) -> bool:
    return sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("passes.fuse_batch_norm leaves only nodes that are refused")


for _op in ("BatchNorm", "_contrib_SyncBatchNorm"):
    lowers(_op, refuses=lambda attrs: attrs["output_mean_var"], only="without output_mean_var")(partial(_refused, _op))


def _residual_relu(out: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Return relu(out + residual), in the memory of `out`: no backward pass needs a normalization's output."""
    if residual is not None:
        out = out.add_(residual) if residual.dtype == out.dtype else out + residual
    return out.relu_() if relu else out


def _normalize(
    data: Tensor, gamma: Tensor, beta: Tensor, moving: tuple[Tensor, Tensor], eps: float, sync: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized data, and the mean and the inverse standard deviation, with sync the biased variance."""
    if not sync:
        out, mean, inverse_std = torch.native_batch_norm(data, gamma, beta, None, None, True, 0.0, eps)
        return out, mean.detach(), inverse_std.detach()
    count, mean, variance = once(lambda: _statistics(data.detach()))
    normalized: Tensor = _Normalize.apply(data, gamma, beta, count, mean, variance, eps)
    seen = count > 0
    return normalized, torch.where(seen, mean, moving[0]), torch.where(seen, variance, moving[1])


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


@torch.no_grad()
def move_statistics(training: bool, layers: Sequence[Moved]) -> None:
    """Move the moving statistics of all layers: few operations for hundreds of small tensors.

    layers: moving_mean, moving_var, the two statistics of `batch_norm`, bias (None: none), all (C,), momentum, eps and
    sync. The moving variance takes the biased one, as in MXNet on a CPU. A layer that saw no image returned its moving
    statistics and keeps them.
    """
    if not training:
        return
    alike: dict[tuple[float, float | None], list[Moved]] = {}
    for layer in layers:
        *_, momentum, eps, sync = layer
        if layer[2] is not layer[0]:
            alike.setdefault((momentum, None if _spans_processes(sync) else eps), []).append(layer)
    for (momentum, inverse_eps), moved in alike.items():
        means, variances = [layer[2] for layer in moved], [layer[3] for layer in moved]
        biased = [(i, bias) for i, (*_, bias, _, _, _) in enumerate(moved) if bias is not None]
        if biased:
            shifted = torch._foreach_add([means[i] for i, _ in biased], [bias for _, bias in biased])
            for (i, _), mean in zip(biased, shifted, strict=True):
                means[i] = mean
        if inverse_eps is not None:
            variances = list(torch._foreach_sub(torch._foreach_pow(variances, -2), inverse_eps))
        moving = [one for layer in moved for one in layer[:2]]
        new = [one for pair in zip(means, variances, strict=True) for one in pair]
        torch._foreach_lerp_(moving, new, 1 - momentum)
