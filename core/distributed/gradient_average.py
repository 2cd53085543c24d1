"""Gradients averaged over the ranks during the backward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.distributed.process_group import ProcessGroup

BUCKET_BYTES = 25 * 2**20


class GradientAverage:
    """Data-parallel mean of gradients with fixed buckets: DistributedDataParallel rebuilds its buckets in the order of
    the first backward pass it sees, so that a resumed run would round its sums in another order.

    Parameters are put into buckets, the last ones first, which is about the order of a backward pass; the all-reduce
    of a complete bucket overlaps with the rest of the pass. Gradients are views of the buckets, not copies.

    overlaps: False where passes call no hooks, in CUDA graphs; `start` then follows the last pass of a step.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: ProcessGroup,
        bucket_bytes: int = BUCKET_BYTES,
        overlaps: bool = True,
    ) -> None:
        self.group = group
        self.overlaps = overlaps
        self._buckets = _in_buckets([p for p in parameters if p.requires_grad][::-1], bucket_bytes)
        self._flat: list[Tensor] = []  # per bucket: its gradients, concatenated
        self._views: list[list[Tensor]] = []  # per bucket: a view of each gradient, strided as its parameter
        self._missing: list[int] = []  # per bucket: gradients that are not computed yet
        self._sent: list[dist.Work] = []
        for number, bucket in enumerate(self._buckets if overlaps else []):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._count(number))
        self.active = False

    def start(self) -> None:
        """Average during the next backward pass, after which the gradients are complete."""
        if not self._flat:
            self._flat = [bucket[0].new_empty(sum(p.numel() for p in bucket)).detach() for bucket in self._buckets]
            self._views = [_views(flat, bucket) for flat, bucket in zip(self._flat, self._buckets, strict=True)]
        for bucket, flat, views in zip(self._buckets, self._flat, self._views, strict=True):
            given = [(view, p.grad) for p, view in zip(bucket, views, strict=True) if p.grad is not None]
            if len(given) < len(bucket):
                flat.zero_()
            if given:
                torch._foreach_copy_([view for view, _ in given], [gradient for _, gradient in given])
            for parameter, view in zip(bucket, views, strict=True):
                parameter.grad = view  # the pass adds to it
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = []
        self.active = True

    def finish(self) -> None:
        """Send the remaining buckets after that pass, and wait for the means."""
        while len(self._sent) < len(self._buckets):  # a bucket with an unused parameter is never complete
            self._send(len(self._sent))
        for number, work in enumerate(self._sent):
            work.wait()
            self._flat[number] /= self.group.world_size
        self._sent = []
        self.active = False

    def _count(self, number: int) -> None:
        """Account for a gradient of a bucket, and send the buckets that are complete, in their order."""
        if not self.active:
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send(len(self._sent))

    def _send(self, number: int) -> None:
        self._sent.append(dist.all_reduce(self._flat[number], async_op=True))


def _views(flat: Tensor, bucket: list[nn.Parameter]) -> list[Tensor]:
    """Return views of `flat` with the parameters' shapes and strides, so that autograd adds without reordering."""
    views, offset = [], 0
    for parameter in bucket:
        views.append(flat.as_strided(parameter.size(), parameter.stride(), offset))
        offset += parameter.numel()  # parameters are dense: their strides leave no gaps
    return views


def _in_buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    size = bucket_bytes
    for parameter in parameters:
        if size >= bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets
