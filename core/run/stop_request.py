"""Ctrl-C and SIGTERM as a wish that the training loop grants after the step it is in."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which the first signal sets `requested`; the second one ends the program at once. `status` is the
    exit status of a program that a signal ended, as shells have it; where the wish was another process's, SIGTERM's.

    In a process that a launcher started they come from the launcher, perhaps twice: a wish however often.
    """

    def __init__(self, launched: bool = False) -> None:
        self.requested = False
        self.status = 128 + signal.SIGTERM
        self.launched = launched
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.status = 128 + number
        if not self.launched:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
