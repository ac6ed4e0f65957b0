"""Several training loaders in one step."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from raylight.contract.errors import DataError, InvalidArguments
from raylight.user.combined_loader import CombinedLoader
from raylight.worker.data.batches import TrainBatches


def loader(length, batch_size=2, **options):
    return DataLoader(TensorDataset(torch.arange(length)), batch_size=batch_size, **options)


def open_ranks(loaders, world_size, **options):
    return [TrainBatches(loaders, rank=rank, world_size=world_size, seed=5, **options) for rank in range(world_size)]


def values(batch, name):
    return batch.data[name][0].tolist()


def test_the_shorter_loader_starts_again_until_the_longest_has_ended():
    batches = open_ranks({"a": loader(10), "b": loader(4)}, 1)[0]
    steps = list(batches.iterate(0))
    assert batches.num_batches == 5
    assert [values(batch, "a") for batch in steps] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert [values(batch, "b") for batch in steps] == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
    assert [batch.last for batch in steps] == [False] * 4 + [True]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_sequence_of_loaders_gives_a_sequence(kind):
    batch = next(iter(open_ranks(kind([loader(4), loader(6)]), 1)[0].iterate(0)))
    assert type(batch.data) is kind
    assert [part[0].tolist() for part in batch.data] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_longest_is_exact_and_every_rank_has_something_of_the_others(world_size):
    ranks = open_ranks({"a": loader(41, shuffle=True), "b": loader(7, shuffle=True)}, world_size)
    read = [list(rank.iterate(0)) for rank in ranks]
    seen = [item for rank in read for batch in rank if batch.size for item in values(batch, "a")]
    assert sorted(seen) == list(range(41))
    assert all(len(values(batch, "b")) >= 1 for rank in read for batch in rank if batch.size)
    assert all((batch.data is None) == (batch.size == 0) for rank in read for batch in rank)


def test_a_shorter_loader_is_shuffled_anew_each_time():
    batches = open_ranks({"a": loader(200, 10), "b": loader(50, 10, shuffle=True)}, 1)[0]
    drawn = [tuple(values(batch, "b")) for batch in batches.iterate(0)]
    cycles = [drawn[low : low + 5] for low in range(0, 20, 5)]
    assert all(sorted(item for batch in cycle for item in batch) == list(range(50)) for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) == 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_epoch_is_the_rest_of_one_that_was_never_stopped(world_size):
    loaders = {"a": loader(40, shuffle=True), "b": loader(7, shuffle=True), "c": [torch.arange(3), torch.arange(2)]}
    for rank in range(world_size):
        whole = list(open_ranks(loaders, world_size)[rank].iterate(1))
        batches = open_ranks(loaders, world_size)[rank]
        for done in (1, 2, 3, 7):
            position = batches.position_after(done - 1)
            rest = list(batches.iterate(1, position))
            assert [batch.index for batch in rest] == [batch.index for batch in whole[done:]]
            for a, b in zip(rest, whole[done:], strict=True):
                assert (values(a, "a"), values(a, "b")) == (values(b, "a"), values(b, "b"))
                assert torch.equal(a.data["c"], b.data["c"])
            batches.iterate(1)  # positions are counted from the beginning again


def test_a_list_of_batches_is_one_loader_and_not_several():
    batches = open_ranks([[torch.arange(2)], [torch.arange(3)]], 1)[0]
    assert [batch.data[0].tolist() for batch in batches.iterate(0)] == [[0, 1], [0, 1, 2]]


def test_limits_hold_for_each_loader():
    assert len(list(open_ranks([loader(20), loader(6)], 1, limit=4)[0].iterate(0))) == 4


def test_what_cannot_be_combined_is_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(int, 1)

    with pytest.raises(DataError, match=r"'b' has no length.*limit_train_batches=N"):
        open_ranks({"a": loader(4), "b": DataLoader(Endless())}, 1)
    with pytest.raises(DataError, match="'b' gives no batch"):
        open_ranks({"a": loader(4), "b": loader(0)}, 1)
    with pytest.raises(InvalidArguments, match="a single training loader"):
        open_ranks([loader(4), loader(4)], 1, global_batch_size=8)
    with pytest.raises(DataError, match="less than one sample for each worker"):
        list(open_ranks([loader(40), loader(2)], 3)[0].iterate(0))


class Numbers(IterableDataset):
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(torch.arange(self.length))


@pytest.mark.parametrize(
    ("mode", "a", "b"),
    [
        ("min_size", [[0, 1], [2, 3]], [[0, 1], [2, 3]]),
        ("max_size_cycle", [[0, 1], [2, 3], [4, 5], [6]], [[0, 1], [2, 3], [0, 1], [2, 3]]),
        ("max_size", [[0, 1], [2, 3], [4, 5], [6]], [[0, 1], [2, 3], None, None]),
    ],
)
def test_each_mode_ends_where_it_says(mode, a, b):
    batches = open_ranks(CombinedLoader({"a": loader(7), "b": loader(4)}, mode), 1)[0]
    steps = list(batches.iterate(0))
    assert batches.num_batches == len(steps) == len(a)
    assert [values(batch, "a") for batch in steps] == a
    assert [None if batch.data["b"] is None else values(batch, "b") for batch in steps] == b
    assert [batch.last for batch in steps] == [False] * (len(a) - 1) + [True]


def test_nested_collections_keep_their_structure():
    batches = open_ranks({"a": [loader(4), loader(6)], "b": {"x": loader(2)}}, 1)[0]
    last = list(batches.iterate(0))[-1].data
    assert [part[0].tolist() for part in (*last["a"], last["b"]["x"])] == [[0, 1], [4, 5], [0, 1]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(41, 7), (7, 41), (16, 17), (20, 20)])
def test_the_shortest_ends_the_epoch_and_nobody_lacks_anything(world_size, lengths):
    loaders = {"a": loader(lengths[0], shuffle=True), "b": loader(lengths[1], shuffle=True)}
    ranks = open_ranks(CombinedLoader(loaders, "min_size"), world_size)
    read = [list(rank.iterate(0)) for rank in ranks]
    assert len({len(steps) for steps in read}) == 1
    assert all(len(steps) == rank.num_batches and steps[-1].last for rank, steps in zip(ranks, read, strict=True))
    full = [batch for steps in read for batch in steps if batch.size]
    for name in ("a", "b"):
        seen = [item for batch in full for item in values(batch, name)]
        assert len(seen) == len(set(seen))
    shortest = "a" if lengths[0] < lengths[1] else "b"
    seen = [item for batch in full for item in values(batch, shortest)]
    assert len(seen) > min(lengths) - world_size


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", ["min_size", "max_size"])
def test_an_epoch_of_any_mode_is_entered_in_its_middle(world_size, mode):
    def collect(batch):
        return {name: None if batch.data[name] is None else values(batch, name) for name in ("a", "b")}

    combined = CombinedLoader({"a": loader(40, shuffle=True), "b": loader(15, shuffle=True)}, mode)
    for rank in range(world_size):
        whole = list(open_ranks(combined, world_size)[rank].iterate(1))
        for done in (1, 3, len(whole) - 1):
            batches = open_ranks(combined, world_size)[rank]
            rest = list(batches.iterate(1, batches.position_after(done - 1)))
            assert list(map(collect, rest)) == list(map(collect, whole[done:]))
            assert rest[-1].last


def test_a_stream_ends_the_epoch_of_the_shortest():
    loaders = {"a": loader(20), "b": DataLoader(Numbers(5), batch_size=2)}
    steps = list(open_ranks(CombinedLoader(loaders, "min_size"), 1, limit=8)[0].iterate(0))
    assert [batch.data["b"].tolist() for batch in steps] == [[0, 1], [2, 3], [4]]
    assert [batch.last for batch in steps] == [False, False, True]


def test_a_stream_beside_others_begins_again_until_the_limit():
    loaders = {"a": loader(20), "b": DataLoader(Numbers(4), batch_size=2)}
    steps = list(open_ranks(loaders, 1, limit=5)[0].iterate(0))
    assert [batch.data["b"].tolist() for batch in steps] == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
    assert [values(batch, "a")[0] for batch in steps] == [0, 2, 4, 6, 8]
