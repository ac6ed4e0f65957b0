"""The parts of the wall time add up, on a clock of the test's own."""

from __future__ import annotations

import pytest

from raylight.contract.messages import Saved, StageStarted
from raylight.driver.goodput import PARTS, GoodputClock


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def start(goodput_clock: GoodputClock, stage: str = "train") -> None:
    goodput_clock.follow(0, StageStarted(stage, 0, 0, 10))


def test_parts_add_up_to_the_wall_time(clock):
    goodput_clock = GoodputClock(clock)
    clock.now += 3
    start(goodput_clock, "sanity")
    clock.now += 1
    start(goodput_clock)
    clock.now += 20
    goodput_clock.follow(0, Saved("d", 1, 0, (), {}, False, stall_s=0.5, write_s=2.0))
    goodput_clock.follow(1, Saved("d", 1, 0, (), {}, False, stall_s=0.7, write_s=2.0))
    goodput_clock.note_failure(loses_work=False)
    clock.now += 2
    start(goodput_clock)
    clock.now += 10
    goodput_clock.finish()
    clock.now += 1
    parts = goodput_clock.read({"data": 4.0, "validation": 5.0})
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(37.0)
    assert parts["start_up"] == 4.0
    assert parts["recovery"] == 2.0
    assert parts["checkpoint"] == 0.5
    assert parts["compute"] == pytest.approx(30.0 - 9.5)
    assert parts["closing"] == 1.0


def test_lost_work_is_what_was_done_since_the_last_commit(clock):
    goodput_clock = GoodputClock(clock)
    start(goodput_clock)
    clock.now += 10
    goodput_clock.note_commit()
    clock.now += 4
    goodput_clock.note_failure(loses_work=True)
    clock.now += 1
    start(goodput_clock)
    clock.now += 6
    parts = goodput_clock.read({})
    assert parts["lost_work"] == 4.0
    assert parts["compute"] == 16.0


def test_a_workers_clock_cannot_claim_more_than_there_was(clock):
    goodput_clock = GoodputClock(clock)
    start(goodput_clock)
    clock.now += 2
    parts = goodput_clock.read({"data": 3.0, "validation": 1.0})
    assert parts["compute"] == 0.0
    assert sum(parts.values()) == pytest.approx(2.0)
