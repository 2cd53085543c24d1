"""A part of a lowered graph whose activations are recomputed in the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint


class Segment(nn.Module):
    """Wrap torch's checkpoint, which alone would update moving statistics twice and repeat collectives.

    Layers inside call `once`. The segment has no parameters of its own: `body` is called with the training flag, the
    activations that cross into the segment, and the parameters and moving statistics of its layers.
    """

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(
        self, training: bool, crossing: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        def run(*crossing: Tensor) -> Any:
            return self.body(training, *crossing, *parameters)

        if not training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return tuple(run(*crossing))
        out = checkpoint(run, *crossing, use_reentrant=False, preserve_rng_state=False, context_fn=_two_passes)
        return tuple(out)


class _Passes(threading.local):
    """The pass of a segment that this thread runs. The backward pass may run in a thread of autograd's."""

    now: _Pass | None = None


_passes = _Passes()


class _Pass:
    """A first pass, which appends to its tape, or a recomputation, which reads the tape from its start."""

    def __init__(self, tape: list[Any], is_second: bool) -> None:
        self.tape = tape
        self.is_second = is_second
        self.position = 0
        self._outer: _Pass | None = None

    def __enter__(self) -> None:
        self._outer, _passes.now, self.position = _passes.now, self, 0

    def __exit__(self, *_: object) -> None:
        _passes.now = self._outer


def _two_passes() -> tuple[_Pass, _Pass]:
    tape: list[Any] = []
    return _Pass(tape, is_second=False), _Pass(tape, is_second=True)


def once(compute: Callable[[], Any]) -> Any:
    """Return compute(); in a recomputation return the first pass's result: collectives run once."""
    now = None if torch.compiler.is_compiling() else _passes.now
    if now is None:
        return compute()
    if not now.is_second:
        now.tape.append(compute())
        return now.tape[-1]
    now.position += 1
    return now.tape[now.position - 1]
