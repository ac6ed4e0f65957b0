"""Evaluation: the batches of one process, dealt to the ranks; nothing padded, nothing left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    get_worker_info,
)

from raylight.contract.errors import DataError
from raylight.user.combined_loader import CombinedLoader
from raylight.worker.data.batches import EvaluationBatches

WORLD_SIZES = [1, 2, 3, 4, 7]


class Numbers(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor(index)


class Counting(IterableDataset):
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        yield from map(torch.tensor, range(self.length))


class Sized(Counting):
    def __len__(self):
        return self.length


class ByWorker(Counting):
    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        yield from map(torch.tensor, range(first, self.length, step))


class Permuted(Sampler):
    """Draws from the global random numbers, which differ between ranks."""

    def __iter__(self):
        return iter(np.random.permutation(23).tolist())


class Buckets(Sampler):
    def __iter__(self):
        yield from ([0, 1, 2], [3], [4, 5], [6, 7, 8, 9, 10])

    def __len__(self):
        return 4


def flat(batches):
    return [sample for batch in batches for sample in batch]


def evaluate(loader, world_size, **options):
    """All ranks' batches in the order of their indices."""
    ranks = [EvaluationBatches(loader, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    found = {}
    for rank, batches in enumerate(ranks):
        for index, batch, _ in batches.iterate():
            assert index not in found
            assert index % world_size == rank
            found[index] = (batch[0] if isinstance(batch, list) else batch).reshape(-1).tolist()
    assert sorted(found) == list(range(len(found)))
    if ranks[0].num_batches is not None and ranks[0].source.num_batches is not None:
        assert {batches.num_batches for batches in ranks} == {len(found)}
    return [found[index] for index in range(len(found))]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("length", [4, 23, 103])
def test_the_batches_are_those_of_one_process(length, drop_last, world_size):
    for dataset in (Numbers(length), TensorDataset(torch.arange(length)), Counting(length), Sized(length)):
        loader = DataLoader(dataset, batch_size=4, drop_last=drop_last)
        expected = [(batch[0] if isinstance(batch, list) else batch).tolist() for batch in loader]
        assert evaluate(loader, world_size) == expected
        assert evaluate(loader, world_size, limit=3) == expected[:3]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_samplers_of_a_users_own(world_size):
    assert evaluate(DataLoader(Numbers(11), batch_sampler=Buckets()), world_size) == list(Buckets())
    loader = DataLoader(Numbers(23), batch_size=4, sampler=Permuted())
    batches = evaluate(loader, world_size)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]
    assert sorted(flat(batches)) == list(range(23))
    assert batches == evaluate(loader, 1)
    shuffled = DataLoader(Numbers(23), batch_size=4, shuffle=True)
    assert evaluate(shuffled, world_size) == evaluate(shuffled, 1) != evaluate(DataLoader(Numbers(23), batch_size=4), 1)
    distributed = DataLoader(
        Numbers(23), batch_size=4, sampler=DistributedSampler(range(23), num_replicas=2, rank=0, shuffle=False)
    )
    assert flat(evaluate(distributed, world_size)) == list(range(23))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_loader_workers_change_nothing(num_workers, world_size):
    for dataset in (Numbers(23), Counting(23)):
        loader = DataLoader(dataset, batch_size=4, num_workers=num_workers, persistent_workers=True)
        expected = [[*range(low, min(low + 4, 23))] for low in range(0, 23, 4)]
        ranks = [EvaluationBatches(loader, rank=rank, world_size=world_size) for rank in range(world_size)]
        for _ in range(2):
            found = {index: batch.tolist() for rank in ranks for index, batch, _ in rank.iterate()}
            assert [found[index] for index in sorted(found)] == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_that_divides_itself_gives_each_sample_once(num_workers, world_size):
    loader = DataLoader(ByWorker(36), batch_size=2, num_workers=num_workers)
    assert sorted(flat(evaluate(loader, world_size))) == list(range(36))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_iterable_of_batches(world_size):
    batches = [torch.arange(low, low + 3) for low in range(0, 21, 3)]
    assert evaluate(batches, world_size) == [batch.tolist() for batch in batches]
    assert evaluate(batches, world_size, limit=0.5) == [batch.tolist() for batch in batches[:3]]
    assert evaluate(iter(batches), 1) == [batch.tolist() for batch in batches]


def test_an_endless_stream_is_read_up_to_its_limit():
    class Endless(Counting):
        num_read = 0

        def __iter__(self):
            while True:
                Endless.num_read += 1
                yield torch.tensor(0)

    assert len(evaluate(DataLoader(Endless(0), batch_size=2), 1, limit=5)) == 5
    assert Endless.num_read == 10
    assert len(evaluate(DataLoader(Endless(0), batch_size=2), 3, limit=5)) == 5


def test_a_limit_of_zero_evaluates_nothing():
    assert evaluate(DataLoader(Numbers(9), batch_size=2), 2, limit=0) == []


@pytest.mark.parametrize(
    "loader", [DataLoader(Numbers(0), batch_size=2), DataLoader(Numbers(3), batch_size=4, drop_last=True), []]
)
def test_nothing_to_evaluate_is_an_error(loader):
    with pytest.raises(DataError, match=r"is empty|do not fill"):
        EvaluationBatches(loader, rank=0, world_size=2)


def test_batches_of_a_subset_are_fetched_by_row():
    loader = DataLoader(Subset(TensorDataset(torch.arange(50)), range(49, 0, -2)), batch_size=4)
    expected = [batch[0].tolist() for batch in loader]
    assert evaluate(loader, 3) == expected
    assert EvaluationBatches(loader, rank=0, world_size=3).source.rows is not None


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_a_combined_loader_gives_the_batches_of_one_process(world_size, mode):
    loaders = {"a": DataLoader(Numbers(11), batch_size=2), "b": [DataLoader(Numbers(5), batch_size=2), range(4)]}
    combined = CombinedLoader(loaders, mode)
    expected = [batch for batch, _, _ in combined]
    found = {}
    for rank in range(world_size):
        batches = EvaluationBatches(combined, rank=rank, world_size=world_size)
        assert batches.num_batches == len(expected)
        for index, batch, size in batches.iterate():
            assert index % world_size == rank
            assert size == len(batch["a"] if mode != "min_size" else batch["b"][0])
            found[index] = batch
    assert str([found[index] for index in range(len(expected))]) == str(expected)
    assert EvaluationBatches(combined, rank=0, world_size=1, limit=2).num_batches == 2


def test_a_combined_loader_without_an_end_is_refused():
    with pytest.raises(DataError, match="set its `limits`"):
        EvaluationBatches(CombinedLoader([DataLoader(Counting(5)), range(3)], "max_size"), rank=0, world_size=1)
