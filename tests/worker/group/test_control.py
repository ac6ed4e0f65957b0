"""Ranks are threads here: each ticks through its steps as fast as it likes, and the test is the driver."""

from __future__ import annotations

import signal
import sys
import threading
import time
import timeit

import pytest

from raylight.contract.requests import Request
from raylight.worker.group.control import Action, Control, Halted
from tests.worker.nets import Line, make_loader
from tests.worker.ranks import make_task, run_task


class RankThread:
    """A loop of `num_steps` steps that writes down at which step it acted on what."""

    def __init__(self, num_steps: int, first_step: int = 0, gate: dict[int, threading.Event] | None = None):
        self.control = Control()
        self.acted: list[tuple[int, str]] = []
        self.last_step = -1
        self.error: BaseException | None = None
        self._steps, self._gate = range(first_step, first_step + num_steps), gate or {}
        self.reached = {step: threading.Event() for step in self._gate}
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            for step in self._steps:
                if step in self._gate:
                    self.reached[step].set()
                    self._gate[step].wait(10)
                action = self.control.tick(step)
                if action is not None:
                    self.acted.append((step, action.request))
                    if action.request == Request.STOP:
                        return
                self.last_step = step
        except Halted as halted:
            self.error = halted

    def start(self) -> RankThread:
        self.thread.start()
        return self

    def join(self) -> None:
        self.thread.join(10)
        assert not self.thread.is_alive()


def hold_and_release(ranks: list[RankThread], request: Request) -> int:
    boundary = max(rank.control.hold() for rank in ranks)
    for rank in ranks:
        rank.control.release(boundary, request)
    return boundary


def test_tick_does_nothing_when_nothing_was_asked():
    control = Control()
    assert [control.tick(step) for step in range(5)] == [None] * 5
    assert control.pending is None


def test_ranks_at_different_steps_act_at_the_boundary_of_the_furthest():
    gates = [{3: threading.Event()}, {7: threading.Event()}, {5: threading.Event()}]
    ranks = [RankThread(100, gate=gate).start() for gate in gates]
    for rank in ranks:
        next(iter(rank.reached.values())).wait(10)
    boundary = hold_and_release(ranks, Request.SAVE)
    for gate in gates:
        next(iter(gate.values())).set()
    for rank in ranks:
        rank.join()
    assert boundary == 7
    assert [rank.acted for rank in ranks] == [[(7, Request.SAVE)]] * 3
    assert [rank.last_step for rank in ranks] == [99] * 3


def test_free_running_ranks_always_agree():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a thread switch after nearly every bytecode
    try:
        ranks = [RankThread(10**9, first_step=1).start() for _ in range(3)]
        boundaries = [hold_and_release(ranks, Request.SAVE) for _ in range(300)]
        boundaries.append(hold_and_release(ranks, Request.STOP))
        for rank in ranks:
            rank.join()
    finally:
        sys.setswitchinterval(interval)
    assert ranks[0].acted == ranks[1].acted == ranks[2].acted
    assert [name for _, name in ranks[0].acted] == [Request.SAVE] * 300 + [Request.STOP]
    assert all(step >= boundary for (step, _), boundary in zip(ranks[0].acted, boundaries, strict=True))


class TickedInBetween(Control):
    """Lets `meanwhile` run right after `hold` has read the step, the worst moment there is."""

    meanwhile: threading.Thread | None = None

    @property
    def step(self) -> int:
        step = self._step
        thread, self.meanwhile = self.meanwhile, None
        if thread is not None:
            thread.start()
            thread.join(0.2)
        return step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step


def test_a_tick_in_the_middle_of_a_hold_does_not_slip_through():
    control = TickedInBetween()
    control.tick(4)
    acted: list[Action | None] = []
    ticking = control.meanwhile = threading.Thread(target=lambda: acted.append(control.tick(5)))
    boundary = control.hold()
    control.release(boundary, Request.SAVE)
    ticking.join(10)
    assert acted == [Action(Request.SAVE, boundary)]
    assert boundary == 5


def test_a_rank_that_is_ahead_waits_for_the_release():
    rank = RankThread(10, gate={4: threading.Event()}).start()
    rank.reached[4].wait(10)
    assert rank.control.hold() == 4
    rank._gate[4].set()
    rank.thread.join(0.2)
    assert rank.thread.is_alive()
    assert rank.control.hold() == 4  # asked again, it does not move
    rank.control.release(6, Request.STOP)
    rank.join()
    assert rank.acted == [(6, Request.STOP)]


def test_release_without_an_action_lets_go():
    rank = RankThread(10, gate={2: threading.Event()}).start()
    rank.reached[2].wait(10)
    rank.control.release(rank.control.hold())
    rank._gate[2].set()
    rank.join()
    assert rank.acted == []
    assert rank.last_step == 9


def test_a_rank_that_has_not_begun_acts_at_its_first_boundary():
    control = Control()
    control.release(control.hold(), Request.SAVE)
    assert control.pending is not None
    assert control.tick(1200) == Action(Request.SAVE, 0)
    assert control.tick(1201) is None


def test_two_actions_for_one_boundary_are_done_one_after_the_other():
    control = Control()
    control.tick(3)
    control.release(control.hold(), Request.SAVE)
    control.release(control.hold(), Request.INTERRUPT)
    names = [action.request if action else None for action in (control.tick(step) for step in (4, 5, 6))]
    assert names == [Request.SAVE, Request.INTERRUPT, None]


def test_request_acts_at_the_next_boundary_without_a_driver():
    control = Control()
    control.tick(1)
    control.request(Request.INTERRUPT)
    assert control.pending is not None
    action = control.tick(2)
    assert action is not None
    assert action == Action(Request.INTERRUPT, 2)
    assert control.tick(3) is None


def test_request_from_a_signal_handler_is_never_lost():
    control = Control()
    before = signal.signal(signal.SIGALRM, lambda number, frame: control.request(Request.SAVE))
    done, step = 0, 0
    try:
        for _ in range(300):
            signal.setitimer(signal.ITIMER_REAL, 1e-5)
            due = done + 1
            while done < due:
                step += 1
                if step % 7 == 0:  # the driver works on it too
                    control.release(control.hold())
                done += control.tick(step) is not None
    finally:
        signal.signal(signal.SIGALRM, before)
    assert done == 300


@pytest.mark.parametrize("broken", [False, True])
def test_halting_raises_at_the_next_tick_and_in_check(broken: bool):
    control = Control()
    control.tick(1)
    control.check()
    control.abort("rank 1 died") if broken else control.stop_now("rank 1 died")
    with pytest.raises(Halted, match="rank 1 died") as caught:
        control.tick(2)
    assert caught.value.broken is broken
    with pytest.raises(Halted):
        control.check()
    control.keep("weights")
    control.resume()
    assert control.tick(1) is None
    assert control.kept == "weights"


def test_halting_wakes_a_rank_that_waits_for_its_release():
    rank = RankThread(10, gate={2: threading.Event()}).start()
    rank.reached[2].wait(10)
    rank.control.hold()
    rank._gate[2].set()
    rank.control.abort("rank 0 died")
    rank.join()
    assert isinstance(rank.error, Halted)


# ---- standing still


class Standing:
    """A rank that stands still in a thread of its own, until it may go on or has to leave."""

    def __init__(self, control: Control):
        self.control, self.error = control, None
        control.beat = ("train", 7, -1.0)
        self.thread = threading.Thread(target=self._stand, daemon=True)
        self.thread.start()

    def _stand(self) -> None:
        try:
            self.control.stand_still()
        except Halted as halted:
            self.error = halted

    def wait_until_it_stands(self) -> None:
        deadline = time.monotonic() + 10
        while self.control.beat[2] < 0:  # it shows that it is alive
            assert time.monotonic() < deadline
            self.thread.join(0.001)

    def is_on(self) -> bool:
        self.thread.join(10)
        return not self.thread.is_alive()


def test_a_rank_that_was_paused_stands_still_until_it_may_go_on():
    control = Control()
    control.tick(3)
    control.release(control.hold(), Request.PAUSE)
    assert control.tick(4) == Action(Request.PAUSE, 4)
    rank = Standing(control)
    rank.wait_until_it_stands()
    assert control.beat[:2] == ("train", 7)
    assert rank.thread.is_alive()
    control.release(control.hold(), Request.SAVE)  # what else is asked for does not end a pause
    rank.thread.join(0.01)
    assert rank.thread.is_alive()
    control.go_on()
    assert rank.is_on()
    assert rank.error is None
    assert control.tick(5) == Action(Request.SAVE, 5)


def test_a_pause_ends_when_the_rank_has_to_leave():
    control = Control()
    control.release(control.hold(), Request.PAUSE)
    rank = Standing(control)
    rank.wait_until_it_stands()
    control.abort("rank 1 died")
    assert rank.is_on()
    assert isinstance(rank.error, Halted)
    control.resume()  # the next generation is not paused
    assert Standing(control).is_on()


@pytest.mark.parametrize("request_", [None, Request.SAVE])
def test_where_no_pause_was_asked_for_nobody_stands_still(request_: Request | None):
    control = Control()
    if request_ is not None:
        control.release(control.hold(), request_)
    assert Standing(control).is_on()


def test_a_pause_that_is_over_before_its_boundary_is_none():
    control = Control()
    control.tick(1)
    control.release(control.hold(), Request.PAUSE)
    control.release(control.hold(), Request.SAVE)
    control.go_on()
    assert control.pending == Action(Request.SAVE, 2)  # which nobody took back
    assert [control.tick(2), control.tick(3)] == [Action(Request.SAVE, 2), None]
    assert Standing(control).is_on()


def test_the_next_generation_knows_nothing_of_what_was_asked_for():
    control = Control()
    assert control.beat[:2] == ("start", 0)
    control.tick(3)
    control.show_life("train", 3)
    control.release(control.hold(), Request.SAVE)
    control.request(Request.STOP)
    control.hold()
    control.resume()
    assert control.beat[:2] == ("start", 3)
    assert control.pending is None
    assert [control.tick(0), control.tick(4)] == [None, None]
    control.resume()
    assert control.hold() == 0  # no boundary of it is passed


def test_stacks_begin_with_that_of_the_loop_and_count_those_of_libraries():
    class Looking(Line):
        def on_train_start(self) -> None:
            looked.append(control.stacks())

    control, gate, looked = Control(), threading.Event(), []
    thread = threading.Thread(target=gate.wait, args=(10,))
    try:
        for _ in range(2):
            run_task(make_task(Looking(), make_loader(2), max_epochs=1), control=control)
            if not thread.is_alive():
                thread.start()
    finally:
        gate.set()
        thread.join()
    for text in looked:
        assert text.startswith("Thread MainThread:")
        assert "in on_train_start" in text
    before, after = (int(text.split()[-4]) for text in looked)
    assert after == before + 1


def test_stacks_show_what_another_thread_does():
    control, gate = Control(), threading.Event()

    def stuck_in_user_code() -> None:
        gate.wait(10)

    thread = threading.Thread(target=stuck_in_user_code, name="training")
    thread.start()
    text = control.stacks()
    gate.set()
    thread.join()
    assert "Thread training" in text
    assert "stuck_in_user_code" in text


def test_age_counts_from_the_last_beat():
    control = Control()
    control.beat = ("train", 7, control.beat[2] - 5.0)
    stage, step, age_s = control.age()
    assert (stage, step) == ("train", 7)
    assert 5.0 <= age_s < 60.0
    control.show_life_again()
    stage, step, age_s = control.age()
    assert (stage, step) == ("train", 7)
    assert age_s < 5.0


def test_a_tick_costs_less_than_a_microsecond():
    control = Control()
    assert min(timeit.repeat(lambda: control.tick(5), number=10_000, repeat=5)) / 10_000 < 1e-6
