"""What is logged under one name: newest value, folding, and names."""

from __future__ import annotations

import pytest
import torch

from raylight.worker.metrics.series import Series


class Mean:
    """Counts how often it is computed and reset, as a torchmetrics object would be."""

    def __init__(self):
        self.num_resets = 0

    def reset(self):
        self.num_resets += 1


def make(reduce="mean", on_step=True, on_epoch=True, **options) -> Series:
    return Series("train", "loss", on_step, on_epoch, reduce, prog_bar=True, logger=False, **options)


def add(series: Series, *pairs: tuple[float, float]) -> None:
    for value, weight in pairs:
        series.values.append(value)
        series.weights.append(weight)


def test_a_new_one_holds_nothing():
    series = make()
    assert (series.at, series.fresh, series.touched, series.guessed, series.both) == (0, False, False, False, False)
    assert (series.metric, series.last, series.values, series.weights, series.folded) == (None, None, [], [], [])


def test_names_carry_a_suffix_if_both_values_were_asked_for():
    assert make().step_name == "loss"
    assert make(both=True).step_name == "loss_step"


@pytest.mark.parametrize(
    ("options", "reduction", "of_steps"),
    [
        ({"reduce": "max"}, "max", "max"), ({"reduce": torch.median}, "callable", "mean"),
        ({"metric": Mean()}, "metric", "mean"),
    ],
)  # fmt: skip
def test_flags(options, reduction, of_steps):
    series = make(both=True, **options)
    assert series.flags == (reduction, True, True, True, False)
    assert series.step_reduce == of_steps
    assert series.flags == series.flags


def test_folding_keeps_the_newest_and_the_weighted_sum():
    series = make()
    assert series.newest() is None
    assert not series.is_used
    add(series, (1.0, 2), (4.0, 3))
    assert series.newest() == (4.0, 3)
    assert series.is_used
    assert series.fold() == [(14.0, 5)]
    assert (series.values, series.weights, series.last) == ([], [], (4.0, 3))
    assert series.newest() == (4.0, 3)
    add(series, (1.0, 1))
    assert series.newest() == (1.0, 1)
    assert series.fold() == [(15.0, 6)]
    assert series.fold() == [(15.0, 6)]
    series.folded, series.values = [], []
    assert series.is_used


def test_of_what_is_logged_per_step_alone_the_newest_is_kept():
    series = make(on_epoch=False)
    add(series, (1.0, 2), (torch.tensor(4.0), 3))
    assert series.fold() == []
    assert series.last == (torch.tensor(4.0), 3)


def test_an_epoch_that_is_over_leaves_nothing():
    series = make(fresh=True, touched=True, metric=Mean())
    add(series, (1.0, 2))
    series.fold()
    add(series, (1.0, 2))
    series.forget()
    assert not series.is_used
    assert (series.fresh, series.touched, series.newest()) == (False, False, None)
    assert series.metric.num_resets == 0


@pytest.mark.parametrize("touched", [False, True])
def test_what_does_not_count_is_forgotten_by_the_metric_too(touched):
    series = make(metric=Mean(), touched=touched)
    assert series.is_used is touched
    series.begin_anew()
    assert series.metric.num_resets == int(touched)
    assert not series.is_used
