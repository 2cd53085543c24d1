"""A child process that exits when its parent process does, even if that one is killed."""

from __future__ import annotations

import os
import time
from threading import Thread


def exit_with_parent(parent: int) -> None:
    """Exit from this process about a second after `parent`, the process that started it, has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    Thread(target=watch, daemon=True).start()
