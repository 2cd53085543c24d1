"""The operators of a training step, counted without computing: their launches, the bytes that they move, layouts.

N images, C channels, H x W cells.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config.section import fill
from core.engine.trainer import Trainer
from models.record import Batch

PARTS = ("forward", "backward", "update")
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass
class StepCount:
    """The operators of a step. Each counts as one launch, whatever number of kernels it has on a device; views and
    allocations are left out.

    An operator moves the bytes of its inputs and outputs; a tensor that it may change in place is read and written.
    Caches are not modelled, nor the memory that an operator allocates for itself.
    """

    launches: Counter[str] = field(default_factory=Counter)  # by part
    moved: Counter[str] = field(default_factory=Counter)  # bytes, by part
    launches_of: Counter[str] = field(default_factory=Counter)  # by operator
    moved_by: Counter[str] = field(default_factory=Counter)  # bytes, by operator
    not_channels_last: list[str] = field(default_factory=list)  # the maps (N, C, H, W) of another layout


def count_step(trainer: Trainer, batch: Batch) -> StepCount:
    """Return the count of one step, on a batch that config.transform.batch has been applied to.

    The step runs on fake tensors, which have shapes, types and layouts but no values: the trainer stays as it is, and
    every machine counts the same. A captured CUDA graph and torch.compile are left out: the operators are those that
    they would capture and compile. On a CPU the gradients of the losses are counted as multiplied by a factor, which a
    run leaves out, because it reads that the factor is 1.
    """
    config = copy.copy(trainer.config)
    fill(config, "transform", replace(config.transform, batch=[]))
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        parts = (trainer.module, trainer.optimizer, trainer.scale, batch)
        module, optimizer, scale, batch = copy.deepcopy(parts)
    copied = replace(trainer, config=config, module=module, optimizer=optimizer, scale=scale, metrics=[], graphed=None)
    with fake:
        for step in range(2):  # the first also makes what the optimizer keeps
            with OperatorCount() as counting:
                copied.step([batch], step)
    return counting.count


class OperatorCount(TorchDispatchMode):
    """Counts the operators below autograd, where composite ones are taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count = StepCount()
        self._part = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        out = _fake_of(func, inputs)(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1:
            self._part = 1
        elif self._part == 1:
            self._part = 2
        storages = {_storage(tensor) for tensor in inputs}
        made = [tensor for tensor in _tensors(out) if _storage(tensor) not in storages]
        changed = list(_tensors(_changed(func, args, kwargs)))
        if (made or changed) and func.overloadpacket.__name__ not in ALLOCATIONS:
            self._note(str(func).removeprefix("aten."), [*inputs, *made, *changed], made)
        return out

    def _note(self, operator: str, moved: list[Tensor], made: list[Tensor]) -> None:
        count, part, num_byte = self.count, PARTS[self._part], sum(map(_bytes, moved))
        count.launches[part] += 1
        count.moved[part] += num_byte
        count.launches_of[operator] += 1
        count.moved_by[operator] += num_byte
        for tensor in made:
            if not _is_channels_last(tensor):
                shape, strides = tuple(tensor.shape), tensor.stride()
                count.not_channels_last.append(f"{part}: {operator} returns {shape} with strides {strides}")


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, each once where it is expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _changed(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that an operator may write to."""
    written = [(i, arg) for i, arg in enumerate(func._schema.arguments) if arg.alias_info and arg.alias_info.is_write]
    return [args[i] if i < len(args) else kwargs.get(arg.name) for i, arg in written]


def _is_channels_last(tensor: Tensor) -> bool:
    """Return False for a map of several channels and columns whose channels are further apart in memory."""
    return tensor.ndim != 4 or 1 in (tensor.shape[1], tensor.shape[3]) or tensor.stride(1) < tensor.stride(3)


def _fake_of(func: Any, inputs: list[Tensor]) -> Callable[..., Any]:
    """Return the operator; for fake tensors a better fake of those whose own differ from what torch's kernels return:
    they give statistics of a half type, where gamma and the kernels' statistics are float32."""
    if func is torch.ops.aten.native_batch_norm.default:
        data, gamma = inputs[:2]
    elif func is torch.ops.aten.native_batch_norm_backward.default:
        _, data, gamma = inputs[:3]
    else:
        return func
    return lambda *_: (torch.empty_like(data), torch.empty_like(gamma), torch.empty_like(gamma))
