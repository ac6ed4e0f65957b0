"""Values of ranks that do not live to end their epoch."""

from __future__ import annotations

from typing import Any

from raylight.driver.departed_values import DepartedValues


def of(rank: int) -> dict[str, Any]:
    return {"loss": rank}


def fill(*ranks: int) -> DepartedValues:
    values = DepartedValues()
    for rank in ranks:
        values.note(rank, 0, of(rank))
    return values


def test_rank_0_takes_over_the_values_of_ranks_that_are_gone_once():
    values = fill(0, 1, 2)
    values.depart([1])
    values.renumber([0, 2])
    assert values.hand_over() == ((0, of(1)),)
    assert values.hand_over() == ()
    assert values.read(0) == [(0, of(0)), (0, of(1))]
    assert values.read(1) == [(0, of(2))]


def test_they_are_handed_on_if_rank_0_is_gone_next():
    values = fill(0, 1)
    values.depart([1])
    values.renumber([0])
    values.hand_over()
    values.depart([0])
    assert values.hand_over() == ((0, of(0)), (0, of(1)))


def test_a_new_report_of_a_rank_replaces_its_last():
    values = fill(0)
    values.note(0, 1, of(5))
    assert values.read(0) == [(1, of(5))]


def test_a_checkpoint_holds_what_all_ranks_had_logged():
    values = fill(0, 1)
    values.depart([1])
    values.clear()
    assert values.hand_over() == ()
    assert values.read(0) == []
