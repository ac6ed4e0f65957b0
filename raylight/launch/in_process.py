"""One worker in the caller's own process, without Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from raylight.config import Config
from raylight.messages import Message
from raylight.task import Place, Task
from raylight.worker import entry
from raylight.worker.control import Control


class InProcessGroup:
    """The worker group of `num_workers=0`; behaves as a group on Ray with one rank."""

    def __init__(self, config: Config):
        uses_gpu = config.use_gpu if config.use_gpu is not None else torch.cuda.is_available()
        device = f"cuda:{torch.cuda.current_device()}" if uses_gpu else "cpu"
        self.places = [Place(node=os.uname().nodename, device=device)]
        self.control = Control()

    can_recover = False  # what failed here failed in the caller's own process

    @property
    def world_size(self) -> int:
        return 1

    def run(self, task: Task) -> Iterator[tuple[int, Message]]:
        self.control = Control()
        self.places[0] = replace(self.places[0], generation=0)
        for message in entry.run(task, self.places[0], self.control):
            yield 0, message

    def rejoin(self, task: Task) -> Iterator[tuple[int, Message]]:
        """Goes on with the state that a failed run has left."""
        place = self.places[0] = replace(self.places[0], generation=self.places[0].generation + 1)
        for message in entry.run(task, place, self.control):
            yield 0, message

    def request(self, action: str) -> None:
        """Acts at the next step boundary. Safe in a signal handler."""
        self.control.request(action)

    @property
    def exception(self) -> BaseException | None:
        """What ended the run, with its real traceback."""
        return self.control.kept.get("exception")

    def halt(self) -> None:
        """There is nothing that could go on."""

    def shutdown(self) -> None:
        self.control.kept.clear()
