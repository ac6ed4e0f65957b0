"""One worker in the caller's own process, without Ray."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from dataclasses import replace

import torch

from raylight.contract.config import Config
from raylight.contract.messages import Message
from raylight.contract.requests import Request
from raylight.contract.task import Place, Task
from raylight.driver.group import Group, Messages
from raylight.worker import task_runner
from raylight.worker.group.control import Control


class InProcessGroup(Group):
    """The worker group of `num_workers=0`; behaves as a group on Ray with one rank."""

    def __init__(self, config: Config):
        uses_gpu = config.use_gpu if config.use_gpu is not None else torch.cuda.is_available()
        if uses_gpu and config.gpu_indices:
            torch.cuda.set_device(config.gpu_indices[0])
        device = f"cuda:{torch.cuda.current_device()}" if uses_gpu else "cpu"
        self.places = [Place(node=os.uname().nodename, device=device)]
        self.control = Control()
        self._messages: Iterator[Message] = iter(())

    is_local = True

    @property
    def world_size(self) -> int:
        return 1

    def run(self, task: Task) -> Messages:
        self.control = Control()
        self.places[0] = replace(self.places[0], generation=0)
        return self._follow(task)

    def rejoin(self, task: Task) -> Messages:
        """Goes on with the state that a failed run has left."""
        self.places[0] = replace(self.places[0], generation=self.places[0].generation + 1)
        return self._follow(task)

    def _follow(self, task: Task) -> Messages:
        self._messages = task_runner.run(task, self.places[0], self.control)
        for message in self._messages:
            yield 0, message

    def request(self, request: Request) -> None:
        """Acts at the next step boundary. Safe in a signal handler."""
        self.control.request(request)

    @property
    def exception(self) -> BaseException | None:
        """The exception that ended the run, with its real traceback."""
        return self.control.exception

    def pause(self) -> None:
        """A `Paused` will come at the next step boundary, once what was begun to be written is on storage."""
        self.control.request(Request.PAUSE_IN_PROCESS)

    def resume(self) -> None:
        """Nothing is trained while nobody asks for the next message; and at the end a rank waits for its files."""
        self.control.go_on()

    def halt(self) -> None:
        """Ends the run at once."""
        if isinstance(self._messages, Generator):
            self._messages.close()

    def wait(self) -> None:
        """A run that was halted here has ended."""
