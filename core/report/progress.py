"""Progress of long work over images, with images per second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINES_EVERY = 30.0  # seconds between lines where stderr is no terminal


def progress(items: Iterable[T], total: int | None, what: str, enabled: bool = True) -> Iterator[T]:
    """Yield the items, and show on stderr how many have passed: a bar on a terminal, else a line every half minute."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, unit="image", disable=not enabled, leave=False)
        return
    start = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        now = time.monotonic()
        if enabled and now - last >= LINES_EVERY:
            last = now
            of = f" of {total}" if total is not None else ""
            print(f"{what}: {count}{of} images, {count / (now - start):.1f} images/s", file=sys.stderr, flush=True)
        yield item
