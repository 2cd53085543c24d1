"""Gradients averaged over the processes while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn

from core.distributed.process_group import ProcessGroup

BUCKET_BYTES = 25 * 2**20


class GradientAverage:
    """Replaces every parameter's gradient by its mean over the ranks, while the backward pass goes on.

    torch's DistributedDataParallel orders its buckets by the first backward pass that it sees, so that a resumed run
    would round its sums in another order; here buckets never change and a resumed run repeats bit for bit.

    Parameters are put into buckets, the last ones first, as a backward pass reaches them in about that order; a full
    bucket is sent while the pass goes on. Gradients are views of the buckets: nothing is held twice.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], group: ProcessGroup, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.group = group
        self._buckets = _in_buckets([p for p in parameters if p.requires_grad][::-1], bucket_bytes)
        self._flat: list[Tensor] = []  # of every bucket: its gradients one after the other, as they travel
        self._views: list[list[Tensor]] = []  # of every bucket: each gradient in it, strided as its parameter
        self._missing: list[int] = []  # of every bucket: gradients that have not come
        self._sent: list[dist.Work] = []
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))
        self.active = False

    def start(self) -> None:
        """Expect the gradients to be complete after the next backward pass."""
        if not self._flat:
            self._flat = [bucket[0].new_empty(sum(p.numel() for p in bucket)).detach() for bucket in self._buckets]
            self._views = [_views(flat, bucket) for flat, bucket in zip(self._flat, self._buckets, strict=True)]
        for bucket, views in zip(self._buckets, self._views, strict=True):
            for parameter, view in zip(bucket, views, strict=True):
                if parameter.grad is None:
                    view.zero_()
                else:
                    view.copy_(parameter.grad)
                parameter.grad = view  # the pass adds to it
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = []
        self.active = True

    def finish(self) -> None:
        """Send what is left after that pass, and wait for the means."""
        while len(self._sent) < len(self._buckets):  # a parameter without a gradient holds its bucket back
            self._send(len(self._sent))
        for number, work in enumerate(self._sent):
            work.wait()
            self._flat[number] /= self.group.world_size
        self._sent = []
        self.active = False

    def _arrived(self, number: int) -> None:
        if not self.active:
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send(len(self._sent))

    def _send(self, number: int) -> None:
        self._sent.append(dist.all_reduce(self._flat[number], async_op=True))


def _views(flat: Tensor, bucket: list[nn.Parameter]) -> list[Tensor]:
    """Parts of `flat` with the shapes and strides of the parameters, so that nothing is reordered in adding to them."""
    views, offset = [], 0
    for parameter in bucket:
        views.append(flat.as_strided(parameter.size(), parameter.stride(), offset))
        offset += parameter.numel()  # of dense tensors: their strides leave no gaps
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
