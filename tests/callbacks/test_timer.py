from __future__ import annotations

from datetime import timedelta

import pytest

from raylight.callbacks import Timer, timer
from raylight.contract.errors import InvalidArguments


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(timer.time, "monotonic", lambda: Clock.now)
    return Clock


def run_steps(callback, rank, clock, step_s, limit):
    """Steps made until training is stopped."""
    for rank.global_step in range(1, limit + 1):
        rank.global_step -= 1
        callback.on_before_zero_grad(rank, None, None)
        clock.now += step_s
        rank.global_step += 1
        callback.on_train_batch_end(rank, None, None, None, 0)
        if rank.should_stop:
            return rank.global_step
    return limit


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("01:02:03:04", 93784.0), (timedelta(minutes=1), 60.0), ({"hours": 2, "seconds": 1}, 7201.0), (None, None)],
)
def test_durations_are_read(duration, seconds):
    assert Timer(duration).time_remaining() == seconds


@pytest.mark.parametrize("duration", ["1:2:3", 5, {"hour": 1}, "x"])
def test_durations_that_are_none(duration):
    with pytest.raises(InvalidArguments, match="Timer: duration"):
        Timer(duration)


def test_one_worker_stops_with_the_first_step_that_is_too_late(make_rank, clock):
    callback, rank = Timer("00:00:00:10"), make_rank()
    callback.on_train_start(rank, None)
    assert run_steps(callback, rank, clock, 0.75, 100) == 14
    callback.on_train_end(rank, None)
    clock.now += 50
    assert callback.time_elapsed() == 10.5
    assert callback.time_remaining() == -0.5
    assert rank.notices == [("Timer stops training after 0:00:10, as asked for.", "info")]


def test_several_workers_agree_at_most_once_a_second_and_more_often_towards_the_end(make_rank, clock):
    callback, checks = Timer("00:00:00:10"), []
    rank = make_rank(world_size=2)
    rank.broadcast = lambda value, src=0: checks.append(rank.global_step) or value
    callback.on_train_start(rank, None)
    assert checks == []  # a start is none of those
    assert run_steps(callback, rank, clock, 0.01, 5000) == pytest.approx(1000, abs=2)
    assert len(checks) < 30


def test_interval_epoch_asks_at_the_end_of_epochs_alone(make_rank, clock):
    callback, rank = Timer("00:00:00:01", interval="epoch", verbose=False), make_rank()
    callback.on_train_start(rank, None)
    run_steps(callback, rank, clock, 2.0, 3)
    assert not rank.should_stop
    callback.on_train_epoch_end(rank, None)
    assert rank.should_stop
    assert not rank.notices


def test_a_run_that_goes_on_has_used_up_what_it_had_used_up(make_rank, clock):
    callback, rank = Timer("00:00:00:10"), make_rank()
    callback.on_train_start(rank, None)
    run_steps(callback, rank, clock, 1.0, 4)
    state = callback.state_dict()
    clock.now = 5.0  # another machine, another clock
    resumed, rank = Timer("00:00:00:10"), make_rank()
    resumed.load_state_dict(state)
    resumed.on_train_start(rank, None)
    assert resumed.time_elapsed() == 4.0
    assert run_steps(resumed, rank, clock, 1.0, 100) == 6
    spent, rank = Timer("00:00:00:10"), make_rank()
    spent.load_state_dict(resumed.state_dict())
    spent.on_train_start(rank, None)
    assert rank.should_stop


def test_training_that_starts_again_after_a_loss_has_begun_before(make_rank, clock):
    callback, rank, checks = Timer("00:00:01:00"), make_rank(world_size=2), []
    rank.broadcast = lambda value, src=0: checks.append(rank.global_step) or value
    callback.setup(rank, None, "fit")
    callback.on_train_start(rank, None)
    run_steps(callback, rank, clock, 0.1, 50)
    checks.clear()
    callback.on_train_start(rank, None)
    assert callback.time_elapsed() == pytest.approx(5.0)
    callback.on_before_zero_grad(rank, None, None)
    assert checks == [50]  # whatever a rank had agreed with the one that is lost
    callback.setup(rank, None, "fit")
    callback.on_train_start(rank, None)
    assert callback.time_elapsed() == 0.0


def test_stages_are_measured_apart(make_rank, clock):
    callback, rank = Timer(), make_rank()
    assert callback.start_time("validate") is None
    for begin, end, stage, seconds in (
        (callback.on_validation_start, callback.on_validation_end, "validate", 2.0),
        (callback.on_test_start, callback.on_test_end, "test", 3.0),
        (callback.on_predict_start, callback.on_predict_end, "predict", 4.0),
    ):
        begin(rank, None)
        clock.now += seconds
        end(rank, None)
        assert callback.time_elapsed(stage) == seconds
        assert callback.end_time(stage) == clock.now
    with pytest.raises(InvalidArguments, match="Did you mean 'validate'"):
        callback.time_elapsed("validation")
