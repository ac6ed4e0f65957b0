"""Ranks are merged exactly, in step order, in bounded memory."""

from __future__ import annotations

import math

import pytest

from raylight.contract.messages import StepMetrics, StepRow, StepValue
from raylight.driver import aggregate
from raylight.driver.aggregate import StepAggregator, say_incomplete


def message(*rows: tuple[int, dict[str, tuple[float, float, str]]], time: float = 1.0, epoch: int = 0) -> StepMetrics:
    return StepMetrics(
        tuple(
            StepRow(step, epoch, time, {name: StepValue(*value) for name, value in values.items()})
            for step, values in rows
        )
    )


def mean(value: float, weight: float = 1.0) -> dict[str, tuple[float, float, str]]:
    return {"loss": (value, weight, "mean")}


def test_a_row_comes_out_when_every_rank_has_sent_it():
    aggregator = StepAggregator(3)
    assert aggregator.add(0, message((10, mean(1.0)))) == []
    assert aggregator.add(2, message((10, mean(2.0)))) == []
    assert aggregator.add(1, message((10, mean(6.0)), time=4.0)) == [(10, 0, 4.0, {"loss": 3.0})]
    assert aggregator.flush() == []


def test_reductions_over_ranks():
    def values(x: float, weight: float) -> dict[str, tuple[float, float, str]]:
        return {name: (x, weight, name) for name in ("mean", "sum", "min", "max")}

    aggregator = StepAggregator(3)
    aggregator.add(0, message((1, values(2.0, 30.0))))
    aggregator.add(1, message((1, values(5.0, 10.0))))
    ((_, _, _, merged),) = aggregator.add(2, message((1, values(-1.0, 0.0))))
    assert merged == {"mean": (2 * 30 + 5 * 10) / 40, "sum": 6.0, "min": -1.0, "max": 5.0}


@pytest.mark.parametrize("reduce", ["mean", "sum", "min", "max"])
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_nan_on_any_rank_is_seen(reduce, bad_rank):
    aggregator = StepAggregator(2)
    rows = []
    for rank in range(2):
        value = math.nan if rank == bad_rank else 1.0
        rows += aggregator.add(rank, message((1, {"x": (value, 1.0, reduce)})))
    assert math.isnan(rows[0][3]["x"])


def test_one_rank_passes_straight_through():
    rows = StepAggregator(1).add(0, message((1, mean(0.5, 7.0)), (2, {"n": (4.0, 1.0, "sum")}), epoch=3))
    assert rows == [(1, 3, 1.0, {"loss": 0.5}), (2, 3, 1.0, {"n": 4.0})]


def test_names_that_only_some_ranks_logged_are_merged_over_those():
    aggregator = StepAggregator(2)
    aggregator.add(0, message((1, {"loss": (1.0, 1.0, "mean"), "only_0": (9.0, 2.0, "mean")})))
    ((_, _, _, values),) = aggregator.add(1, message((1, mean(3.0))))
    assert values == {"loss": 2.0, "only_0": 9.0}


def test_ranks_at_different_speeds_keep_step_order():
    aggregator = StepAggregator(2)
    aggregator.add(0, message(*((step, mean(float(step))) for step in range(1, 6))))
    assert [row[0] for row in aggregator.add(1, message((1, mean(1.0)), (2, mean(2.0))))] == [1, 2]
    assert [row[0] for row in aggregator.add(1, message((3, mean(3.0)), (4, mean(4.0))))] == [3, 4]
    assert aggregator.flush() == [(5, 0, 1.0, {"loss": 5.0})]


def test_a_step_that_one_rank_skipped_comes_out_before_the_next_complete_one():
    aggregator = StepAggregator(2)
    aggregator.add(0, message((1, mean(1.0)), (2, mean(2.0))))
    rows = aggregator.add(1, message((2, mean(4.0))))
    assert rows == [(1, 0, 1.0, {"loss": 1.0}), (2, 0, 1.0, {"loss": 3.0})]


def test_repeated_and_late_rows_are_ignored():
    aggregator = StepAggregator(2)
    aggregator.add(0, message((1, mean(1.0))))
    assert aggregator.add(0, message((1, mean(50.0)))) == []
    assert aggregator.add(1, message((1, mean(3.0)))) == [(1, 0, 1.0, {"loss": 2.0})]
    assert aggregator.add(1, message((1, mean(3.0)))) == []
    assert aggregator.flush() == []
    alone = StepAggregator(1)
    alone.add(0, message((1, mean(1.0))))
    assert alone.add(0, message((1, mean(1.0)))) == []


def test_a_row_is_merged_over_a_failure_and_comes_out_once():
    aggregator = StepAggregator(3)
    aggregator.add(0, message((7, mean(1.0)), (8, mean(2.0)), (9, mean(3.0))))
    aggregator.add(1, message((7, mean(4.0)), (8, mean(8.0))))
    aggregator.add(2, message((7, mean(1.0))))  # and is killed
    rows, incomplete = aggregator.regroup(2, {2}, last_step=9)
    assert rows == [(8, 0, 1.0, {"loss": 5.0})]
    assert incomplete == [8, 9]
    assert aggregator.add(0, message((10, mean(1.0)))) == []
    assert aggregator.add(1, message((9, mean(5.0)), (10, mean(2.0)))) == [
        (9, 0, 1.0, {"loss": 4.0}), (10, 0, 1.0, {"loss": 1.5})
    ]  # fmt: skip
    assert aggregator.flush() == []


def test_a_step_that_only_a_dead_rank_had_made_is_merged_when_it_is_made_again():
    aggregator = StepAggregator(2)
    aggregator.add(0, message((7, mean(1.0)), (8, mean(9.0))))
    aggregator.add(1, message((7, mean(3.0))))
    assert aggregator.regroup(2, {0}, last_step=7) == ([], [])
    assert aggregator.add(0, message((8, mean(1.0)))) == []
    assert aggregator.add(1, message((8, mean(3.0)))) == [(8, 0, 1.0, {"loss": 2.0})]


def test_a_late_share_reaches_its_row_in_a_group_of_one():
    aggregator = StepAggregator(3)
    aggregator.add(0, message((4, mean(1.0))))
    aggregator.add(2, message((4, mean(2.0))))
    assert aggregator.regroup(1, {0, 2}, last_step=4) == ([], [])
    assert aggregator.add(0, message((4, mean(6.0)), (5, mean(7.0)))) == [
        (4, 0, 1.0, {"loss": 3.0}), (5, 0, 1.0, {"loss": 7.0})
    ]  # fmt: skip
    assert aggregator.add(0, message((6, mean(8.0)))) == [(6, 0, 1.0, {"loss": 8.0})]


def test_a_share_that_never_comes_does_not_hold_up_later_rows():
    aggregator = StepAggregator(2)
    aggregator.add(0, message((4, mean(1.0))))
    assert aggregator.regroup(2, (), last_step=4) == ([], [])
    aggregator.add(0, message((5, mean(1.0))))
    assert [row[0] for row in aggregator.add(1, message((5, mean(3.0))))] == [4, 5]


def test_redo_gives_out_what_is_left_and_lets_steps_be_made_again():
    aggregator = StepAggregator(2)
    aggregator.add(0, message((7, mean(1.0)), (8, mean(2.0)), (9, mean(2.0))))
    aggregator.add(1, message((7, mean(3.0))))
    assert aggregator.redo(1, last_step=8) == [(8, 0, 1.0, {"loss": 2.0})]
    assert aggregator.add(0, message((9, mean(5.0)))) == [(9, 0, 1.0, {"loss": 5.0})]
    assert aggregator.redo(3, last_step=8) == []
    for rank in range(2):
        assert aggregator.add(rank, message((9, mean(0.0)))) == []
    assert aggregator.add(2, message((9, mean(3.0)))) == [(9, 0, 1.0, {"loss": 1.0})]


def test_memory_is_bounded_when_a_rank_never_sends(monkeypatch):
    monkeypatch.setattr(aggregate, "MAX_PENDING", 10)
    aggregator = StepAggregator(2)
    out = []
    for step in range(1, 31):
        out += aggregator.add(0, message((step, mean(1.0))))
        assert len(aggregator._pending) <= 10
    assert [row[0] for row in out] == list(range(1, 21))
    assert [row[0] for row in aggregator.flush()] == list(range(21, 31))


def test_an_unknown_reduction_is_an_error():
    aggregator = StepAggregator(2)
    aggregator.add(0, message((1, {"x": (1.0, 1.0, "median")})))
    with pytest.raises(ValueError, match="median"):
        aggregator.add(1, message((1, {"x": (1.0, 1.0, "median")})))


@pytest.mark.parametrize("order", [(2.0, 3.0, 5.0), (5.0, 3.0, 2.0), (3.0, 5.0, 2.0)])
def test_an_extreme_is_found_whichever_rank_has_it(order):
    aggregator = StepAggregator(3)
    rows = []
    for rank, value in enumerate(order):
        rows += aggregator.add(rank, message((1, {"low": (value, 10.0, "min"), "high": (value, 1.0, "max")})))
    assert rows[0][3] == {"low": 2.0, "high": 5.0}


def test_a_row_that_has_come_out_is_not_made_again_by_the_next_group():
    aggregator = StepAggregator(2)
    aggregator.add(0, message((8, mean(1.0))))
    aggregator.add(1, message((8, mean(3.0))))
    aggregator.regroup(2, {1}, last_step=8)
    for rank in range(2):
        assert aggregator.add(rank, message((8, mean(9.0)))) == []
    assert aggregator.flush() == []


@pytest.mark.parametrize(
    ("steps", "gone", "parts"),
    [
        ([8], {2}, ["in step 8 is", "rank 2 ended before saying its part"]),
        ([8, 9, 11], {3, 1}, ["in steps 8 to 11 is", "ranks 1, 3 ended before saying their part"]),
        ([8, 9], {1}, ["in steps 8 to 9 is", "rank 1 ended before saying its part"]),
    ],
)
def test_rows_that_lack_a_share_are_named_with_the_ranks_that_are_gone(steps, gone, parts):
    assert [part for part in parts if part not in say_incomplete(steps, gone)] == []
