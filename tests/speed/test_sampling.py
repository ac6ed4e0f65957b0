"""When a figure is known well enough, and what is more than noise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, cycle

import pytest
import torch

from raylight.speed import sampling
from raylight.speed.sampling import Samples, resample_ratio, take_samples, time_calls, warm_up

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stands still, but for the seconds that a call lets pass."""
    now = [0.0]
    monkeypatch.setattr(sampling, "perf_counter", lambda: now[0])

    def let_pass(seconds: float) -> None:
        now[0] += seconds

    return let_pass


def test_each_call_is_timed(clock):
    durations = iter([0.5, 0.25, 0.125])
    assert time_calls(lambda: clock(next(durations)), 3, CPU) == [0.5, 0.25, 0.125]


def test_percentiles_mean_and_spread():
    samples = Samples([float(number) for number in range(1, 101)], [1.0] * 10)
    assert samples.percentile(50) == pytest.approx(50.5)
    assert samples.percentile(99) == pytest.approx(99.01)
    assert samples.mean == pytest.approx(50.5)
    assert samples.spread == 0.0
    assert Samples([], [1.0, 1.2] * 10).spread == pytest.approx(0.1 / 1.1)


def test_warming_up_ends_once_a_call_gets_no_faster(clock):
    durations, num_calls = iter([1.0, 0.6, 0.3, 0.2] + [0.2] * 50), count(1)

    def call() -> None:
        clock(next(durations))
        next(num_calls)

    spent = warm_up(call, CPU, max_s=100.0)
    assert next(num_calls) - 1 == 6  # four that got faster, and two that did not
    assert spent == pytest.approx(1.0 + 0.6 + 0.3 + 0.2 * 3)


def test_warming_up_is_bounded(clock):
    durations = (0.9**number for number in count())
    assert warm_up(lambda: clock(next(durations)), CPU, max_s=2.0) == pytest.approx(1.0 + 0.9 + 0.81)


def test_a_steady_call_needs_no_more_than_the_least(clock):
    [samples] = take_samples([lambda: clock(0.01)], CPU, max_s=100.0, spread=0.02)
    assert len(samples.latencies) == sampling.MIN_CALLS
    assert samples.spread == pytest.approx(0.0, abs=1e-9)


def test_an_unsteady_call_is_measured_until_the_time_is_over(clock):
    durations = cycle([0.1, 0.3])
    [samples] = take_samples([lambda: clock(next(durations))], CPU, max_s=30.0, spread=1e-6)
    assert sum(samples.latencies) == pytest.approx(30.0, abs=0.3)
    assert samples.spread > 1e-6


def test_calls_take_turns(clock):
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        clock(0.05)

    calls = [lambda: call("a"), lambda: call("b")]
    samples = take_samples(calls, CPU, max_s=10.0, spread=0.02)
    assert order[-6:] == ["a", "b"] * 3
    assert len(samples[0].blocks) == len(samples[1].blocks)


def test_rounds_that_were_slow_for_both_do_not_hide_a_difference():
    machine = [1.0, 1.5, 1.1, 1.9, 1.0, 1.4, 1.2, 1.7, 1.3, 1.6]
    ours, theirs = machine, [1.1 * its for its in machine]
    paired, apart = resample_ratio(ours, theirs, paired=True), resample_ratio(ours, theirs, paired=False)
    assert paired.min() == pytest.approx(1.1)
    assert paired.max() == pytest.approx(1.1)
    assert apart.min() < 1.0 < apart.max()
