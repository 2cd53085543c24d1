"""The plan of a training step's recomputation (activation checkpointing, MXNet's memonger).

The operators of a prefix of the graph, in the order in which they run, are cut into segments. A segment keeps its
inputs; what its operators save inside is recomputed when the backward pass reaches it, and freed after it. The peak is
either what the forward pass leaves, or what it left before some segment plus the inside of that segment.

The bytes are those of `symbol.memory.activations`. Gradients of activations, workspaces of convolutions and the outputs
that a caller holds come on top, with and without recomputation.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (contiguous segments of an order).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from symbol.attributes import nearest
from symbol.memory.activations import Activations, Storage
from symbol.ops import find_op

_NUM_LIMIT = 12  # sizes of segments to try, from all that is saved down by _RATIO each
_RATIO = 0.65


@dataclass(frozen=True)
class Plan:
    """Segments as (start, stop) positions among the operators of the lowered graph, in order."""

    counted: Activations
    segments: tuple[tuple[int, int], ...]

    @cached_property
    def peak_bytes(self) -> int:
        """The most activation bytes at a time: after the forward pass, or while a segment is recomputed."""
        return max(
            [self.forward_bytes, *(self._held[start] + self.inside_bytes(start, stop) for start, stop in self.segments)]
        )

    @property
    def forward_bytes(self) -> int:
        """The bytes that the forward pass leaves for the backward pass."""
        return self._held[-1]

    def inside_bytes(self, start: int, stop: int) -> int:
        """Return the bytes that a recomputed segment holds beside its inputs."""
        kept: set[Storage] = set().union(*self.counted.saves[start:stop])
        return self.counted.bytes_of(kept - _read(self.counted, start, stop))

    @cached_property
    def _held(self) -> list[int]:
        """Per position, the bytes held by it and the positions before it when the backward pass reaches it."""
        stops, holds = dict(self.segments), [0] * len(self.counted.operators)
        seen: set[Storage] = set()
        position = 0
        while position < len(holds):
            stop = stops.get(position)
            storages = self.counted.saves[position] if stop is None else _read(self.counted, position, stop)
            holds[position] = self.counted.bytes_of(storages - seen)  # its first holder frees it last
            seen |= storages
            position = position + 1 if stop is None else stop
        return list(accumulate(holds))

    @cached_property
    def recomputed_multiply_add(self) -> int:
        """The multiply-adds that are recomputed. A segment stops at its last operator that saves something."""
        counted, total = self.counted, 0
        for start, stop in self.segments:
            last = max((p for p in range(start, stop) if counted.saves[p]), default=start)
            total += sum(
                counted.multiply_add[start:last]
            )  # a convolution at `last` saves its input, which is made by then
        return total

    @property
    def cost(self) -> tuple[int, int]:
        """Recomputed multiply-adds, then (for ties) recomputed operators."""
        return self.recomputed_multiply_add, sum(stop - start for start, stop in self.segments)

    @property
    def until(self) -> str:
        """The name of the last operator that is recomputed."""
        return self.counted.operators[self.segments[-1][1] - 1].name

    def describe(self) -> str:
        """Return the plan in one line of text."""
        mib = 2**20
        without = f"{self.counted.kept_bytes / mib:,.0f} MiB"
        if not self.segments:
            return f"memonger: nothing has to be recomputed, activations {without}"
        forward = sum(self.counted.multiply_add)
        percent = 100 * self.recomputed_multiply_add / max(1, 3 * forward)
        number = f"{len(self.segments)} segment{'s' if len(self.segments) > 1 else ''}"
        return (
            f"memonger: recomputed up to {self.until} in {number}: activations {self.peak_bytes / mib:,.0f} MiB "
            f"instead of {without}, {percent:.1f}% more multiply-adds per step"
        )


def smallest(counted: Activations, until: str | None = None) -> Plan:
    """Return the plan with the smallest peak; of equals, the one that recomputes least.

    until: the name of the last operator to recompute. Raises ValueError for a name that no operator has, or one before
    which nothing can be recomputed.
    """
    return min(_candidates(counted, until), key=lambda plan: (plan.peak_bytes, plan.cost))


def within(counted: Activations, budget: float, until: str | None = None) -> Plan | None:
    """Return the plan that recomputes least among those whose peak is at most `budget` bytes, or None.

    Where everything fits and there is no `until`, the plan has no segments. Errors are those of `smallest`.
    """
    plans = [*_candidates(counted, until), *([Plan(counted, ())] if until is None else [])]
    fitting = [plan for plan in plans if plan.peak_bytes <= budget]
    return min(fitting, key=lambda plan: (plan.cost, plan.peak_bytes), default=None)


def _candidates(counted: Activations, until: str | None) -> Iterator[Plan]:
    """Yield plans with segments of several sizes, and per size every prefix; with `until`, the one prefix."""
    end = len(counted.operators) if until is None else _position(counted, until) + 1
    runs = _runs(counted, end)
    if not runs:
        raise ValueError(f"nothing up to operator '{until}' can be recomputed; name a later one")
    seen = set()
    for exponent in range(_NUM_LIMIT):
        limit = counted.kept_bytes * _RATIO**exponent
        segments = tuple(segment for run in runs for segment in _cut(counted, *run, limit))
        for count in range(1, len(segments) + 1) if until is None else [len(segments)]:
            if segments[:count] not in seen:
                seen.add(segments[:count])
                yield Plan(counted, segments[:count])


def _position(counted: Activations, name: str) -> int:
    names = [node.name for node in counted.operators]
    found = counted.joined.get(name, name)
    if found not in names:
        known = [*names, *counted.joined]
        raise ValueError(
            f"ModelParam.memonger_until: no operator of the graph is named '{name}'; nearest: {nearest(name, known)}"
        )
    return names.index(found)


def _runs(counted: Activations, end: int) -> list[tuple[int, int]]:
    """Return the stretches before `end` that may be recomputed."""
    runs: list[tuple[int, int]] = []
    start = 0
    for position, node in enumerate(counted.operators[:end]):
        if not find_op(node.op).recompute:
            runs.append((start, position))
            start = position + 1
    return [(first, stop) for first, stop in [*runs, (start, end)] if any(counted.saves[first:stop])]


def _cut(counted: Activations, start: int, end: int, limit: float) -> Iterator[tuple[int, int]]:
    """Yield segments whose inside is at most `limit` bytes (or one operator), cut where few bytes cross."""
    crossing = _crossing_bytes(counted)
    while start < end:
        inside, read, made = 0, set[Storage](), set[Storage]()
        stop, best = start, start + 1
        while stop < end:
            # inputs of the segment are kept at the cut, not inside
            read |= {storage for storage in counted.reads[stop] if counted.made.get(storage, -1) < start}
            more = counted.saves[stop] - read - made
            inside += counted.bytes_of(more)
            if inside > limit and stop > start:
                break
            made |= more
            stop += 1
            if inside <= limit / 2 or crossing[stop] <= crossing[best]:
                best = stop
        best = end if stop == end else best
        if made:
            yield start, best
        start = best


def _crossing_bytes(counted: Activations) -> list[int]:
    """Return, per position p, the bytes that are made before operator p and read by it or after it."""
    last: dict[Storage, int] = {}
    for position, storages in enumerate(counted.reads):
        last.update(dict.fromkeys(storages, position))
    change = [0] * (len(counted.operators) + 2)
    for storage, position in last.items():
        change[counted.made.get(storage, -1) + 1] += counted.size[storage]
        change[position + 1] -= counted.size[storage]
    return list(accumulate(change))


def _read(counted: Activations, start: int, stop: int) -> set[Storage]:
    """Return the storages that a segment reads from before it."""
    storages = set().union(*counted.reads[start:stop])
    return {storage for storage in storages if counted.made.get(storage, -1) < start}
