"""Watch: looks at the clock, hangs, nodes that leave and workers that come while the driver waits for messages."""

from __future__ import annotations

import time
from collections.abc import Callable

from raylight.contract.config import Config
from raylight.contract.messages import Message, SaveFailed
from raylight.contract.requests import Request
from raylight.driver.driver import Driver
from raylight.driver.group import Group
from raylight.driver.hangs import FLOOR_S, HangDetector, format_stacks
from raylight.driver.timetable import Timetable

LOOK_EVERY_S = 0.5
DRAIN_LOOK_EVERY_S = 5.0
"""A node says half a minute or more before that it goes."""
HANG_LOOKS = 10.0
"""How often ranks are asked for a sign of life in the time after which one counts as hung."""


class Watch:
    """`look` is called after every message, and a few times a second while none comes."""

    def __init__(
        self, config: Config, group: Group, driver: Driver, stage: str, clock: Callable[[], float] = time.monotonic
    ):
        self.group, self.driver, self.clock = group, driver, clock
        self.timetable = Timetable(config) if stage == "fit" else None
        self.hangs = HangDetector(config.hang_timeout_s, clock)
        workers = config.num_workers
        self.most = workers[1] if isinstance(workers, tuple) and stage == "fit" else 0
        self._periods: dict[Callable[[], None], float] = {}
        if group.can_recover:
            hang_s = min(config.hang_timeout_s or FLOOR_S, FLOOR_S)
            self._periods[self._look_for_hangs] = max(LOOK_EVERY_S, hang_s / HANG_LOOKS)
        if group.can_recover and stage == "fit":
            self._periods[self._look_for_nodes_that_leave] = DRAIN_LOOK_EVERY_S
            self._periods[self._look_for_recruits] = LOOK_EVERY_S
        self.begin()

    def begin(self) -> None:
        """A generation of the group begins."""
        self.hangs.begin()
        if self.timetable is not None:
            self.timetable.begin()
        self.is_regrouping = False
        """All ranks were asked to leave at a step boundary and to form a new group."""
        self.leaving: list[int] = []
        self._due = dict.fromkeys(self._periods, self.clock() + LOOK_EVERY_S)
        if self.most > self.group.world_size:
            self.group.recruit_up_to(self.most)

    def see(self, message: Message) -> None:
        self.hangs.see(message)
        if self.timetable is not None:
            self.timetable.see(message)
        if isinstance(message, SaveFailed) and message.is_torn and self.group.world_size > 1:
            self.group.request(Request.SAVE)
        self.look()

    def look(self) -> None:
        if self.driver.outcome.has_failures:
            return
        for action in self.timetable.due() if self.timetable is not None else ():
            self.group.request(action)
        now = self.clock()
        for look, moment in self._due.items():
            if now >= moment:
                look()
                self._due[look] = self.clock() + self._periods[look]

    def _look_for_hangs(self) -> None:
        if not self.hangs.look(self.group.ages()):
            return
        stacks = self.group.stacks()
        rank, reason, step = self.hangs.find_stuck(stacks)
        text = format_stacks(stacks)
        self.driver.tell(f"rank {rank} hangs ({reason}). What each rank is doing:\n{text}", "warning")
        self.group.end_hung(rank, f"it hung: {reason}", step, text)
        self.hangs.begin()

    def _look_for_nodes_that_leave(self) -> None:
        """A node that is about to be taken away: a checkpoint now, and other workers as soon as there is room."""
        leaving = self.group.draining()
        if leaving and not self.leaving:
            ranks = ", ".join(map(str, leaving))
            self.driver.tell(f"the node of rank {ranks} will be taken away: a checkpoint is made, others are sought")
            self.group.request(Request.SAVE)
        if len(leaving) > len(self.leaving):
            self.group.recruit_up_to(max(self.most, self.group.world_size) + len(leaving))
        self.leaving = leaving

    def _look_for_recruits(self) -> None:
        if not self.is_regrouping and self.group.num_recruits:
            self.is_regrouping = True
            self.group.request(Request.RESIZE)
