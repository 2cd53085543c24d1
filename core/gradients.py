"""Gradients averaged over the processes while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.world import World

BUCKET_BYTES = 25 * 2**20


class GradientAverage:
    """Replaces every parameter's gradient by its mean over the processes.

    Parameters are put into buckets, the last ones first, as a backward pass reaches them in about that order; a full
    bucket is sent while the pass goes on. What is in a bucket, and the order in which buckets are sent, never changes:
    so sums are rounded alike in every step and after every resume.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.world = world
        self._buckets = _in_buckets([p for p in parameters if p.requires_grad][::-1], bucket_bytes)
        self._missing: list[int] = []  # of every bucket: gradients that have not come
        self._sent: list[tuple[dist.Work, Tensor]] = []
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))
        self.active = False

    def begin(self) -> None:
        """The next backward pass completes the gradients."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = []
        self.active = True

    def finish(self) -> None:
        """After it: send what is left, wait, and set the means."""
        while len(self._sent) < len(self._buckets):  # a parameter without a gradient holds its bucket back
            self._send(len(self._sent))
        for bucket, (work, flat) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            flat /= self.world.size
            for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(mean.view_as(parameter))
        self._sent = []
        self.active = False

    def _arrived(self, number: int) -> None:
        if not self.active:
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send(len(self._sent))

    def _send(self, number: int) -> None:
        for parameter in self._buckets[number]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.reshape(-1) for p in self._buckets[number] if p.grad is not None])
        self._sent.append((dist.all_reduce(flat, async_op=True), flat))


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
