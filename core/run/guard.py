"""Guarded phases of a step: a status for the ranks that wait, and an explanation of running out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from core.distributed.process_group import ProcessGroup
from core.engine.out_of_memory import explain_out_of_memory
from core.report.train_log import NoLog, TrainLog

if TYPE_CHECKING:
    from config.schema import Config


class Guard:
    """Runs phases of a training, and brings the lines of all ranks into the main process's log."""

    def __init__(self, config: Config, device: torch.device, group: ProcessGroup, log: TrainLog | NoLog) -> None:
        self.config = config
        self.device = device
        self.group = group
        self.log = log

    @contextmanager
    def phase(self, status: str, at: str, is_test: bool = False) -> Iterator[None]:
        """Run a phase. status: what other ranks print if this one does not answer; at: the place that a MemoryError
        names, such as "step 7"."""
        self.group.set_status(status)
        with explain_out_of_memory(self.config, self.device, at, is_test):
            yield

    def report(self, line: str) -> None:
        """Write a line of this rank to the log, at the latest when the main process next calls `relay`."""
        if self.group.is_main_process:
            self.log.info(line)
        else:
            self.group.send_message(line)

    def relay(self) -> None:
        """Write the lines that other ranks have sent; does nothing outside the main process."""
        for line in self.group.receive_messages() if self.group.is_main_process else ():
            self.log.info(line)
