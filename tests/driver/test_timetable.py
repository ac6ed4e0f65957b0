"""Actions that come with time, on a clock of the test's own."""

from __future__ import annotations

from datetime import timedelta

from raylight.contract.config import Checkpointing, Config
from raylight.contract.messages import Saved, StageFinished, StageStarted
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
    clock.now += 59
    assert timetable.due() == []
    clock.now += 1
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


def test_the_automatic_interval_follows_what_the_run_reports():
    clock, timetable = make(Checkpointing(every_s="auto"))
    timetable.see(saved(stall_s=0.5, write_s=20.0))
    clock.now += 249
    assert timetable.due() == []
    clock.now += 1
    assert timetable.due() == ["save"]


def test_an_interval_that_was_given_stays_whatever_a_checkpoint_costs():
    clock, timetable = make(Checkpointing(every_s=5))
    timetable.see(saved(stall_s=0.5, write_s=20.0))
    clock.now += 5
    assert timetable.due() == ["save"]


EPOCH = StageStarted("train", 0, 0, 6)
VALIDATION, END = StageStarted("validate", 0, 0, 2), StageFinished("validate", 0, 0)


def test_validate_so_many_seconds_after_the_last_validation():
    clock, timetable = make(val_check_interval=timedelta(seconds=10))
    clock.now += 60  # to start the workers
    assert timetable.due() == []
    timetable.see(EPOCH)
    clock.now += 9
    timetable.see(EPOCH)  # another
    assert timetable.due() == []
    clock.now += 1
    assert timetable.due() == ["validate"]
    clock.now += 60
    timetable.see(EPOCH)
    assert timetable.due() == []  # asked for already
    timetable.see(VALIDATION)
    clock.now += 60
    assert timetable.due() == []
    timetable.see(END)
    clock.now += 10
    assert timetable.due() == ["validate"]


def test_a_validation_that_a_failure_has_prevented_is_asked_for_again():
    for before in ([], [VALIDATION]):
        clock, timetable = make(val_check_interval=timedelta(seconds=10))
        timetable.begin()
        timetable.see(EPOCH)
        clock.now += 10
        assert timetable.due() == ["validate"]
        for message in before:
            timetable.see(message)
        timetable.begin()
        assert timetable.due() == []
        timetable.see(EPOCH)
        assert timetable.due() == ["validate"]


def test_a_validation_that_is_not_due_yet_keeps_its_time_through_a_failure():
    clock, timetable = make(val_check_interval=timedelta(seconds=10))
    timetable.see(EPOCH)
    clock.now += 6
    timetable.begin()
    timetable.see(EPOCH)
    clock.now += 4
    assert timetable.due() == ["validate"]


def test_a_failure_after_a_validation_does_not_bring_the_next_one_forward():
    clock, timetable = make(val_check_interval=timedelta(seconds=10))
    for message in (EPOCH, VALIDATION, END):
        timetable.see(message)
    timetable.begin()
    timetable.see(EPOCH)
    clock.now += 9
    assert timetable.due() == []
    clock.now += 1
    assert timetable.due() == ["validate"]


def test_stages_tell_nothing_to_a_run_that_validates_by_steps():
    clock, timetable = make()
    for message in (EPOCH, VALIDATION, END):
        timetable.see(message)
    clock.now += 1e9
    assert timetable.due() == []
