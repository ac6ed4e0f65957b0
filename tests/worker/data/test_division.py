from __future__ import annotations

import pytest
import torch

from raylight.contract.errors import DataError, InvalidArguments
from raylight.worker.data.division import (
    Division,
    deal,
    deal_batches,
    deal_evaluation,
    deal_unsized,
    divide_batch,
    num_limited,
    num_samples_in,
)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("total", [1, 2, 6, 7, 40, 41, 97, 103])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_each_step_is_the_next_part_of_the_sequence_and_weighs_as_one_process_would(total, world_size, micro):
    ranks = [list(deal(range(total), Division(r, world_size, micro), 0, total)) for r in range(world_size)]
    assert {len(steps) for steps in ranks} == {Division(0, world_size, micro).num_steps(total)}
    position = 0
    for steps in zip(*ranks, strict=True):
        units = [unit for step in steps for unit in step.units]
        assert units == list(range(position, position + len(units)))
        assert len(units) == min(micro * world_size, total - position)
        assert all(step.size == len(step.units) <= micro for step in steps)
        assert max(step.size for step in steps) - min(step.size for step in steps) <= 1
        # the mean over ranks of share * mean is the mean over all samples
        assert [step.share for step in steps] == [step.size * world_size / len(units) for step in steps]
        assert {step.uneven for step in steps} == {len(units) < world_size}
        position += len(units)
        assert {step.last for step in steps} == {position == total}
    assert position == total


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize(("global_batch_size", "batch_size"), [(64, 8), (64, 64), (30, 4), (7, 1), (100, 33)])
def test_a_window_holds_the_global_batch_with_any_number_of_workers(world_size, global_batch_size, batch_size):
    micro, accumulate = divide_batch(global_batch_size, world_size, batch_size)
    assert micro <= batch_size
    total = 2 * global_batch_size + global_batch_size // 2
    ranks = [
        list(deal(range(total), Division(r, world_size, micro, accumulate, global_batch_size), 0, total))
        for r in range(world_size)
    ]
    for window in range(2):
        steps = [step for rank in ranks for step in rank[window * accumulate : (window + 1) * accumulate]]
        units = sorted(unit for step in steps for unit in step.units)
        assert units == list(range(window * global_batch_size, (window + 1) * global_batch_size))
        # what the loop does: sum over steps of share * mean / accumulate, then the mean over ranks
        gradient = sum(step.share * sum(step.units) / step.size for step in steps if step.size)
        gradient /= accumulate * world_size
        assert gradient == pytest.approx(sum(units) / len(units))
    rest = [step for rank in ranks for step in rank[2 * accumulate :]]
    units = [unit for step in rest for unit in step.units]
    assert sorted(units) == list(range(2 * global_batch_size, total))
    gradient = sum(step.share * sum(step.units) / step.size for step in rest if step.size) / accumulate / world_size
    assert gradient == pytest.approx(sum(units) / len(units))


def test_full_steps_have_a_share_of_exactly_one():
    for world_size in (1, 2, 3, 4, 7):
        assert {step.share for step in deal(range(70 * 6), Division(0, world_size, 10), 0, 70 * 6)} == {1.0}


def test_a_global_batch_below_the_number_of_workers_is_refused():
    with pytest.raises(InvalidArguments, match="at least 4"):
        divide_batch(3, 4, 8)


def test_positions_and_indices_agree():
    for division in (Division(0, 3, 8), Division(1, 3, 2, 4, 23), Division(0, 1, 5)):
        for index in range(20):
            after = division.position_after(0, index)
            assert after == division.units_in(index + 1)
            if (index + 1) % division.accumulate == 0:
                assert division.index_at(after) == index + 1
                assert division.position_after(after, index + 1) == division.units_in(index + 2)
    assert Division(0, 4, 8).position_after(24, 0) == 24 + 32  # entered in the middle of a step of another division


def test_whole_batches_go_round_and_weigh_by_their_samples():
    batches = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10]]
    ranks = [list(deal_batches(batches, Division(r, 2, 1), 0, 5)) for r in range(2)]
    assert [step.units for step in ranks[0]] == [[0, 1, 2], [4, 5], [10]]
    assert [step.units for step in ranks[1]] == [[3], [6, 7, 8, 9], []]
    assert [step.share for step in ranks[0]] == [3 * 2 / 4, 2 * 2 / 6, 2.0]
    assert [step.share for step in ranks[1]] == [1 * 2 / 4, 4 * 2 / 6, 0.0]
    assert [step.uneven for step in ranks[1]] == [False, False, True]
    assert [step.last for step in ranks[0]] == [False, False, True]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("total", [24, 29])
def test_a_sampler_without_length_is_dealt_as_one_with(total, drop_last):
    for rank in range(3):
        division = Division(rank, 3, 4)
        end = total - total % 12 if drop_last else total
        known = list(deal(list(range(total)), division, 12, end))
        unknown = list(deal_unsized(iter(range(total)), division, 12, None, are_batches=False, drop_last=drop_last))
        assert unknown == known


@pytest.mark.parametrize(
    ("limit", "total", "left"),
    [(1.0, 10, 10), (1, 10, 1), (0, 10, 0), (0.0, 10, 0), (0.25, 10, 2), (50, 10, 10), (5, None, 5), (1.0, None, None),
     (0.0, None, 0), (0.5, 0, 0)],
)  # fmt: skip
def test_limits_mean_what_lightnings_mean(limit, total, left):
    assert num_limited(limit, total) == left


@pytest.mark.parametrize(
    ("limit", "total", "error", "text"),
    [(0.5, None, DataError, "length is unknown"), (0.01, 10, DataError, "at least 0.1"),
     (-1, 10, InvalidArguments, "negative"), (1.5, 10, InvalidArguments, "no fraction"),
     (-0.5, 10, InvalidArguments, "no fraction"), (2.0, 0, InvalidArguments, "no fraction")],
)  # fmt: skip
def test_limits_without_meaning_are_refused(limit, total, error, text):
    with pytest.raises(error, match=text):
        num_limited(limit, total)


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("world_size", [1, 3])
def test_an_order_in_a_tensor_is_dealt_as_one_in_a_list(world_size, start):
    for rank in range(world_size):
        division = Division(rank, world_size, 2)
        total = start + 2 * world_size * 1030 + 5  # full steps are cut a thousand at a time
        listed = list(deal(list(range(total)), division, start, total))
        of_tensor = list(deal(torch.arange(total), division, start, total))
        assert [step._replace(units=list(step.units)) for step in of_tensor] == listed


@pytest.mark.parametrize(("world_size", "micro", "accumulate", "window"), [(1, 4, 1, 0), (3, 4, 1, 0), (2, 3, 2, 11)])
def test_steps_are_counted_as_they_are_dealt(world_size, micro, accumulate, window):
    division = Division(0, world_size, micro, accumulate, window)
    assert division.step == micro * world_size
    assert division.window == (window or micro * world_size * accumulate)
    for total in range(1, 60):
        steps = list(deal(range(total), division, 0, total))
        assert division.num_steps(total) == len(steps)
        if not window:
            assert division.num_even_steps(total) == sum(not step.uneven for step in steps)
        positions = [division.units_in(count) for count in range(len(steps))]
        assert [step.position for step in steps] == positions  # of rank 0, whose part is the first of each step


def test_a_position_within_a_window_belongs_to_the_step_that_begins_it():
    division = Division(1, 2, 3, 2, 11)
    assert [division.index_at(position) for position in (0, 10, 11, 21, 22)] == [0, 0, 2, 2, 4]


def test_a_rank_whose_data_is_its_own_divides_it_alone():
    alone = Division(2, 3, 4, 2, 23).alone()
    assert alone == Division(0, 1, 4, 2, 8)
    assert alone.step == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((64, 4, 8), (8, 2)), ((4, 4, 8), (1, 1)), ((9, 2, 2), (2, 3)), ((7, 1, 7), (7, 1)), ((33, 4, 4), (3, 3))],
)
def test_a_global_batch_is_taken_in_as_few_parts_as_fit(arguments, expected):
    assert divide_batch(*arguments) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_evaluation_goes_round_in_batches_and_pads_nothing(world_size):
    order, batches = list(range(11)), [[0, 1], [2], "whole", [3, 4, 5]]
    of_samples = [list(deal_evaluation(order, Division(r, world_size, 3), 4, False)) for r in range(world_size)]
    of_batches = [list(deal_evaluation(batches, Division(r, world_size, 1), 4, True)) for r in range(world_size)]
    for ranks, expected in (
        (of_samples, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]),
        (of_batches, batches),
    ):
        steps = sorted((step for steps in ranks for step in steps), key=lambda step: step.position)
        assert [(step.position, step.units) for step in steps] == list(enumerate(expected))
        assert [step.size for step in steps] == [1 if unit == "whole" else len(unit) for unit in expected]
        assert {step.share for step in steps} == {1.0}
        assert not any(step.uneven for step in steps)
        for rank, mine in enumerate(ranks):
            assert [step.position for step in mine] == list(range(rank, 4, world_size))
            assert [step.last for step in mine] == [False] * (len(mine) - 1) + [True]


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_sampler_of_batches_without_length_is_dealt_as_one_with(drop_last):
    batches = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10]]
    for rank in range(2):
        division = Division(rank, 2, 1)
        known = list(deal_batches(batches, division, 0, 4 if drop_last else 5))
        unknown = list(deal_unsized(iter(batches), division, 0, None, are_batches=True, drop_last=drop_last))
        assert unknown == known
        bounded = list(deal_unsized(iter(batches), division, 2, 4, are_batches=True, drop_last=drop_last))
        assert bounded == list(deal_batches(batches, division, 2, 4))


@pytest.mark.parametrize(("unit", "count"), [([1, 2, 3], 3), ((), 0), (7, 1), ("name", 1), (b"name", 1)])
def test_samples_behind_what_a_sampler_gave(unit, count):
    assert num_samples_in(unit) == count
