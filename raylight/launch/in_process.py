"""One worker in the caller's own process, without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

import torch

from raylight.contract.config import Config
from raylight.contract.messages import Message
from raylight.contract.task import Place, Task
from raylight.worker import task_runner as entry
from raylight.worker.group.control import Control


class InProcessGroup:
    """The worker group of `num_workers=0`; behaves as a group on Ray with one rank."""

    def __init__(self, config: Config):
        uses_gpu = config.use_gpu if config.use_gpu is not None else torch.cuda.is_available()
        device = f"cuda:{torch.cuda.current_device()}" if uses_gpu else "cpu"
        self.places = [Place(node=os.uname().nodename, device=device)]
        self.control = Control()
        self._messages: Iterator[Message] = iter(())
        self.watch: Callable[[], None] | None = None  # nobody waits here, so it is never called

    can_recover = False  # what failed here failed in the caller's own process

    @property
    def world_size(self) -> int:
        return 1

    def run(self, task: Task) -> Iterator[tuple[int, Message]]:
        self.control = Control()
        self.places[0] = replace(self.places[0], generation=0)
        return self._follow(task)

    def rejoin(self, task: Task) -> Iterator[tuple[int, Message]]:
        """Goes on with the state that a failed run has left."""
        self.places[0] = replace(self.places[0], generation=self.places[0].generation + 1)
        return self._follow(task)

    def _follow(self, task: Task) -> Iterator[tuple[int, Message]]:
        self._messages = entry.run(task, self.places[0], self.control)
        for message in self._messages:
            yield 0, message

    def request(self, action: str) -> None:
        """Acts at the next step boundary. Safe in a signal handler."""
        self.control.request(action)

    @property
    def exception(self) -> BaseException | None:
        """What ended the run, with its real traceback."""
        return self.control.kept.get("exception")

    def pause(self) -> None:
        """A `Paused` will come at the next step boundary, once what was begun to be written is on storage."""
        self.control.request("pause", blocks=False)

    def resume(self) -> None:
        """Nothing is trained while nobody asks for the next message, so there is nothing to let go."""

    def halt(self) -> None:
        """Ends the run where it is."""
        if isinstance(self._messages, Generator):
            self._messages.close()

    def wait(self) -> None:
        """A run that was halted here has ended."""

    def shutdown(self) -> None:
        self.control.kept.clear()
