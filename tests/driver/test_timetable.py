"""Actions that come with time, on a clock of the test's own."""

from __future__ import annotations

from raylight.contract.config import Checkpointing, Config
from raylight.contract.messages import Saved
from raylight.driver.timetable import AUTO_FIRST_S, AUTO_LEAST_S, Timetable


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(checkpoint: Checkpointing | None = None, **config) -> tuple[Clock, Timetable]:
    clock = Clock()
    return clock, Timetable(Config(checkpoint=checkpoint, **config), clock)


def saved(stall_s: float, write_s: float) -> Saved:
    return Saved("checkpoints/step-00000001", 1, 0, (), {}, False, stall_s, write_s)


def test_nothing_is_due_without_limits():
    clock, timetable = make(Checkpointing())
    clock.now += 1e9
    assert timetable.due() == []


def test_save_every_so_many_seconds():
    clock, timetable = make(Checkpointing(every_s=5))
    assert timetable.due() == []
    clock.now += 5
    assert timetable.due() == ["save"]
    assert timetable.due() == []
    clock.now += 7
    assert timetable.due() == ["save"]


def test_the_end_comes_once():
    clock, timetable = make(max_time_s=60)
    clock.now += 61
    assert timetable.due() == ["stop"]
    assert timetable.due() == []


def test_automatic_interval_keeps_the_cost_under_one_percent():
    clock, timetable = make(Checkpointing(every_s="auto"))
    clock.now += AUTO_FIRST_S
    assert timetable.due() == ["save"]
    timetable.learn(saved(stall_s=0.5, write_s=20.0))
    assert timetable.every_s == 250.0
    timetable.learn(saved(stall_s=0.001, write_s=0.1))
    assert timetable.every_s == AUTO_LEAST_S
    timetable.learn(saved(stall_s=0.0, write_s=40.0))
    assert timetable.every_s >= 80.0  # a checkpoint is through before the next is due
