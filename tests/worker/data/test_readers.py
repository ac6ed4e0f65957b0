"""Loaders that are iterated in a way of their own, and what says how long it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from raylight.worker.data.batches import EvaluationBatches, TrainBatches


class Numbers(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


class Twice(DataLoader):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield batch
            yield batch * 10


class Half(DataLoader):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for number, batch in enumerate(super().__iter__()):
            if number % 2 == 0:
                yield batch


class Merged(DataLoader):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = list(super().__iter__())
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            yield torch.cat([first, second])


class Forever:
    def __init__(self, sampler: Any):
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.sampler


class Endless(DataLoader):
    """Keeps its iterator from one epoch to the next; its `__len__` says where an epoch ends."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", Forever(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.sampler)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        while True:
            yield next(self.iterator)


class Backwards(DataLoader):
    @property
    def _index_sampler(self) -> Any:
        return [[7, 6], [5, 4, 3]]

    def __len__(self) -> int:
        return 2


MAKE: list[Callable[..., DataLoader]] = [Twice, Half, Merged, Endless, Backwards]


def expect(kind: Any) -> list[list[int]]:
    loader = kind(Numbers(), batch_size=2)
    return [batch.tolist() for batch, _ in zip(loader, range(8 if kind is Twice else len(loader)), strict=False)]


@pytest.mark.parametrize(
    ("kind", "world_size", "num_workers"),
    [*((kind, world_size, 0) for kind in MAKE for world_size in (1, 2, 3)), (Twice, 2, 1)],
)
def test_batches_are_those_that_the_loader_gives_dealt_to_the_ranks(
    kind: Any, world_size: int, num_workers: int
) -> None:
    ranks: list[list[Any]] = []
    evaluated: dict[int, list[int]] = {}
    for rank in range(world_size):
        loader = kind(Numbers(), batch_size=2, num_workers=num_workers)
        steps = TrainBatches(loader, rank=rank, world_size=world_size, seed=0).iterate(0)
        ranks.append([None if step.data is None else step.data.tolist() for step in steps])
        loader = kind(Numbers(), batch_size=2, num_workers=num_workers)
        batches = EvaluationBatches(loader, rank=rank, world_size=world_size)
        evaluated |= {index: batch.tolist() for index, batch, _ in batches.iterate()}
    trained = [batch for step in zip(*ranks, strict=True) for batch in step if batch is not None]
    assert trained == expect(kind)
    assert [evaluated[index] for index in sorted(evaluated)] == expect(kind)


def test_all_ranks_shuffle_alike_and_every_epoch_anew() -> None:
    epochs = []
    for epoch in range(2):
        loaders = [Twice(Numbers(), batch_size=2, shuffle=True) for _ in range(2)]
        ranks = [TrainBatches(loader, rank=rank, world_size=2, seed=0) for rank, loader in enumerate(loaders)]
        first, second = ([step.data for step in rank.iterate(epoch)] for rank in ranks)
        assert all(torch.equal(a * 10, b) for a, b in zip(first, second, strict=True))
        epochs.append(torch.cat(first).tolist())
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(8))


def test_a_distributed_sampler_in_such_a_loader_divides_the_data_and_hears_the_epoch() -> None:
    samplers = [DistributedSampler(Numbers(), num_replicas=2, rank=rank, shuffle=True, seed=1) for rank in range(2)]
    seen = []
    for rank, sampler in enumerate(samplers):
        loader = Half(Numbers(), batch_size=1, sampler=sampler)
        seen.append([step.data.item() for step in TrainBatches(loader, rank=rank, world_size=2, seed=0).iterate(3)])
    assert [sampler.epoch for sampler in samplers] == [3, 3]
    assert [list(sampler)[::2] for sampler in samplers] == seen


class Sized:
    """Must not be asked for more than it says that it has."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([number] for number in range(3))
        raise RuntimeError("nobody should ask for a fourth")

    def __len__(self) -> int:
        return 3


class SizedSamples(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from range(4)
        raise RuntimeError("nobody should ask for a fifth")

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("make", [Sized, lambda: DataLoader(SizedSamples(), batch_size=2)])
def test_an_iterable_is_not_read_beyond_its_length(make: Any, world_size: int) -> None:
    for rank in range(world_size):
        batches = TrainBatches(make(), rank=rank, world_size=world_size, seed=0)
        whole = list(batches.iterate(0))
        assert whole[-1].last
        position = batches.position_after(0)
        batches.load_state_dict(batches.state_dict(0, 0))
        assert len(list(batches.iterate(0, position))) == len(whole) - 1
        list(EvaluationBatches(make(), rank=rank, world_size=world_size).iterate())
