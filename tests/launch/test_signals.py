"""What counts as a press of Ctrl-C, and what the second and third do."""

from __future__ import annotations

import os
import signal

import pytest

from raylight.launch import signals
from raylight.launch.signals import stop_on_signal


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(signals, "time", clock)
    return clock


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_one_press_that_comes_twice_is_one(clock):
    requests: list[str] = []
    with stop_on_signal(requests.append, lambda *_: None):
        send()
        clock.now += signals.ONE_PRESS_S / 2
        send()
    assert requests == ["interrupt"]


def test_a_second_press_stops_at_once_and_a_third_cannot_cut_the_end_short(clock):
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), stop_on_signal(lambda _: None, lambda text, _: told.append(text)):  # noqa: PT012
        send()
        clock.now += 1
        try:
            send()
        finally:
            clock.now += 1
            send()
            told.append("the end")
    assert "saves a checkpoint" in told[0]
    assert "being written to storage" in told[1]
    assert told[2] == "the end"


def test_no_press_cuts_a_run_short_that_is_being_closed(clock):
    requests, told = [], []
    with stop_on_signal(requests.append, lambda text, _: told.append(text)) as received:
        received.close()
        for _ in range(3):
            send()
            clock.now += 1
    assert requests == []
    assert len(told) == 3


def test_sighup_stops_the_run_and_ends_the_process_unless_it_is_ignored():
    seen, requests = [], []
    before = signal.signal(signal.SIGHUP, lambda number, _: seen.append(number))
    try:
        with stop_on_signal(requests.append, lambda *_: None):
            send(signal.SIGHUP)
            assert (requests, seen) == (["interrupt"], [])
        assert seen == [signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with stop_on_signal(requests.append, lambda *_: None):
            send(signal.SIGHUP)
        assert requests == ["interrupt"]
    finally:
        signal.signal(signal.SIGHUP, before)
