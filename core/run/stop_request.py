"""Stop requests (SIGINT, SIGTERM), which the training loop honours after the current step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context in which the first signal sets `requested`, and a second one ends the program at once.

    `status` is the exit status of a program ended by that signal, by the convention of shells; if another process
    received the signal, that of SIGTERM. In a `launched` process signals come from the launcher, which may repeat
    them: any number of them is one request.
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
