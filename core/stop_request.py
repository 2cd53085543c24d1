"""Ctrl-C and SIGTERM as a wish that the training loop grants after the step it is in."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which the first signal sets `requested`; the second one ends the program at once.

    In a process that a launcher started, the launcher answers Ctrl-C, which reaches every process of a terminal, and
    passes it on as SIGTERM: Ctrl-C is ignored, and SIGTERM is a wish however often it comes.
    """

    def __init__(self, launched: bool = False) -> None:
        self.requested = False
        self.launched = launched
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if self.launched:
            self._before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request)
            return self
        self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self.launched:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
