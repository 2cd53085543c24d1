"""Which activations a training step computes again instead of keeping them (memonger).

The operators of a prefix of the graph, in the order in which they are computed, are cut into segments. A segment keeps
what it reads from before; what its operators keep inside is made again when the backward pass reaches it, and freed
behind it. So the most that is held is either what the forward pass leaves, or what it left before some segment
together with the inside of that segment.

Counted is what `symbol.activations` counts. Gradients on their way, workspaces of convolutions and the outputs that a
caller holds come on top, with and without recomputation.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (contiguous segments of an order).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from symbol.activations import Activations, Storage
from symbol.attributes import nearest

# What may be computed twice. Losses may not: they make their gradient in the forward pass, for good.
_RECOMPUTED = (
    *("Convolution", "BatchNorm", "_contrib_SyncBatchNorm", "Activation", "Pooling", "UpSampling", "Concat", "Cast"),
    *("slice_like", "slice_axis", "add_n", "elemwise_add", "elemwise_sub", "elemwise_mul", "broadcast_mul"),
    *("broadcast_div", "_mul_scalar", "Reshape", "transpose"),
)
_NUM_LIMIT = 12  # sizes of segments that are tried, from all that is kept down by _RATIO each
_RATIO = 0.65


@dataclass(frozen=True)
class Plan:
    """Segments as (first, past the last) positions among the operators of the lowered graph, in order."""

    counted: Activations
    segments: tuple[tuple[int, int], ...]

    @cached_property
    def peak_bytes(self) -> int:
        """The most activations that are held at a time: after the forward pass, or while a segment is recomputed."""
        return max(
            [self.forward_bytes, *(self._held[start] + self.inside_bytes(start, stop) for start, stop in self.segments)]
        )

    @property
    def forward_bytes(self) -> int:
        """What the forward pass leaves."""
        return self._held[-1]

    def inside_bytes(self, start: int, stop: int) -> int:
        """What a segment holds, beside what it read, when it has been recomputed."""
        kept: set[Storage] = set().union(*self.counted.keeps[start:stop])
        return self.counted.bytes_of(kept - _read(self.counted, start, stop))

    @cached_property
    def _held(self) -> list[int]:
        """What is still held when the backward pass has come to each position, by it and those before it."""
        stops, holds = dict(self.segments), [0] * len(self.counted.operators)
        seen: set[Storage] = set()
        position = 0
        while position < len(holds):
            stop = stops.get(position)
            storages = self.counted.keeps[position] if stop is None else _read(self.counted, position, stop)
            holds[position] = self.counted.bytes_of(storages - seen)  # who holds it first frees it last
            seen |= storages
            position = position + 1 if stop is None else stop
        return list(accumulate(holds))

    @cached_property
    def recomputed_multiply_add(self) -> int:
        """What the backward pass computes again. It stops at the last operator of a segment that keeps something."""
        counted, total = self.counted, 0
        for start, stop in self.segments:
            last = max((p for p in range(start, stop) if counted.keeps[p]), default=start)
            total += sum(counted.multiply_add[start:last])  # a convolution there keeps its input, which is made
        return total

    @property
    def cost(self) -> tuple[int, int]:
        """What is computed again: multiply-adds, and of equals operators."""
        return self.recomputed_multiply_add, sum(stop - start for start, stop in self.segments)

    @property
    def until(self) -> str:
        """The name of the last operator that is computed again."""
        return self.counted.operators[self.segments[-1][1] - 1].name

    def describe(self) -> str:
        """A line for people."""
        mib = 2**20
        without = f"{self.counted.kept_bytes / mib:,.0f} MiB"
        if not self.segments:
            return f"memonger: nothing has to be computed again, activations {without}"
        forward = sum(self.counted.multiply_add)
        percent = 100 * self.recomputed_multiply_add / max(1, 3 * forward)
        number = f"{len(self.segments)} segment{'s' if len(self.segments) > 1 else ''}"
        return (
            f"memonger: computed again up to {self.until}, in {number}: activations {self.peak_bytes / mib:,.0f} MiB "
            f"instead of {without}, {percent:.1f}% more multiply-adds in a step"
        )


def smallest(counted: Activations, until: str | None = None) -> Plan:
    """The plan with the smallest peak; of equals, the one that computes least again.

    until: the name of an operator; what is computed up to it, itself among it, is computed again, and nothing behind.
    Raises ValueError for a name that no operator has, or one that comes before anything that could be recomputed.
    """
    return min(_candidates(counted, until), key=lambda plan: (plan.peak_bytes, plan.cost))


def within(counted: Activations, budget: float, until: str | None = None) -> Plan | None:
    """The plan that computes least again among those whose peak is at most `budget` bytes, or None.

    Where everything fits and there is no `until`, its segments are none. Errors are those of `smallest`.
    """
    plans = [*_candidates(counted, until), *([Plan(counted, ())] if until is None else [])]
    fitting = [plan for plan in plans if plan.peak_bytes <= budget]
    return min(fitting, key=lambda plan: (plan.cost, plan.peak_bytes), default=None)


def _candidates(counted: Activations, until: str | None) -> Iterator[Plan]:
    """Segments of several sizes, and of each size every prefix; with `until`, the one prefix."""
    end = len(counted.operators) if until is None else _position(counted, until) + 1
    runs = _runs(counted, end)
    if not runs:
        raise ValueError(f"nothing that could be computed again lies up to operator '{until}'; name a later one")
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
    if name not in names:
        raise ValueError(
            f"ModelParam.memonger_until: no operator of the graph is named '{name}'; nearest: {nearest(name, names)}"
        )
    return names.index(name)


def _runs(counted: Activations, end: int) -> list[tuple[int, int]]:
    """The stretches before `end` that may be recomputed."""
    runs: list[tuple[int, int]] = []
    start = 0
    for position, node in enumerate(counted.operators[:end]):
        if node.op not in _RECOMPUTED:
            runs.append((start, position))
            start = position + 1
    return [(first, stop) for first, stop in [*runs, (start, end)] if any(counted.keeps[first:stop])]


def _cut(counted: Activations, start: int, end: int, limit: float) -> Iterator[tuple[int, int]]:
    """Segments whose inside is at most `limit` bytes (or one operator), cut where few bytes cross."""
    crossing = _crossing_bytes(counted)
    while start < end:
        inside, read, made = 0, set[Storage](), set[Storage]()
        stop, best = start, start + 1
        while stop < end:
            # what comes from before is kept at the cut, not inside
            read |= {storage for storage in counted.reads[stop] if counted.made.get(storage, -1) < start}
            more = counted.keeps[stop] - read - made
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
    """At position p: the bytes that are made before operator p and read by it or behind it."""
    last: dict[Storage, int] = {}
    for position, storages in enumerate(counted.reads):
        last.update(dict.fromkeys(storages, position))
    change = [0] * (len(counted.operators) + 2)
    for storage, position in last.items():
        change[counted.made.get(storage, -1) + 1] += counted.size[storage]
        change[position + 1] -= counted.size[storage]
    return list(accumulate(change))


def _read(counted: Activations, start: int, stop: int) -> set[Storage]:
    """What a segment takes from before it."""
    storages = set().union(*counted.reads[start:stop])
    return {storage for storage in storages if counted.made.get(storage, -1) < start}
