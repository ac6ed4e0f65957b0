"""Timetable: the requests to all ranks that are due because time has passed: checkpoints, validations, and the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from raylight.contract.config import Config
from raylight.contract.messages import Message, Saved, StageFinished, StageStarted
from raylight.contract.requests import Request

AUTO_FIRST_S = 30.0  # the first checkpoint of every_s="auto", which measures what one costs
AUTO_LEAST_S = 10.0
AUTO_SHARE = 0.01  # of the wall time


class Timetable:
    """Asked after every message; messages come several times a second while a run trains."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        began = clock()
        every = config.checkpoint.every_s if config.checkpoint is not None else None
        self.is_automatic = every == "auto"
        self.every_s = AUTO_FIRST_S if every == "auto" else float(every) if every else None
        self.next_save = began + self.every_s if self.every_s else None
        interval = config.val_check_interval
        self.validate_every_s = interval.total_seconds() if isinstance(interval, timedelta) else None
        self.next_validation: float | None = None
        """None also while one is asked for or under way."""
        self.wait_s = self.validate_every_s
        """The time between the beginning of training and the first validation, if that is not planned yet."""
        self.end = began + config.max_time_s if config.max_time_s is not None else None

    def due(self) -> list[Request]:
        """Requests for the group; each is given once."""
        now, actions = self.clock(), []
        if self.next_save is not None and self.every_s is not None and now >= self.next_save:
            self.next_save = now + self.every_s
            actions.append(Request.SAVE)
        if self.next_validation is not None and now >= self.next_validation:
            self.next_validation = None
            actions.append(Request.VALIDATE)
        if self.end is not None and now >= self.end:
            self.end = None
            actions.append(Request.STOP)
        return actions

    def begin(self) -> None:
        """A generation of the group begins, which knows nothing of a validation that was asked of the last one."""
        if self.next_validation is None and self.wait_s is None and self.validate_every_s is not None:
            self.wait_s = 0.0

    def see(self, message: Message) -> None:
        if isinstance(message, Saved):
            self.learn(message)
        elif self.validate_every_s is None or not isinstance(message, (StageStarted, StageFinished)):
            return
        elif message.stage == "validate":
            is_over = isinstance(message, StageFinished)
            self.next_validation = self.clock() + self.validate_every_s if is_over else None
        elif isinstance(message, StageStarted) and message.stage == "train" and self.wait_s is not None:
            self.next_validation, self.wait_s = self.clock() + self.wait_s, None

    def learn(self, saved: Saved) -> None:
        """With every_s="auto" the interval follows what a checkpoint was seen to cost: the stall of the loop, and a
        tenth of the time that writing shares the machine with training."""
        if self.is_automatic:
            cost = saved.stall_s + 0.1 * saved.write_s
            self.every_s = max(AUTO_LEAST_S, cost / AUTO_SHARE, 2.0 * saved.write_s)
            self.next_save = self.clock() + self.every_s
