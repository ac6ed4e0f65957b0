"""Training batches of map-style loaders: the same samples in the same order, whatever the number of workers."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.seeding import rng_state
from raylight.worker.data.batches import TrainBatches, num_limited

WORLD_SIZES = [1, 2, 3, 4, 7]


class Numbers(Dataset):
    """Sample i is i, plus what augmentation draws from all three kinds of random numbers."""

    def __init__(self, length: int, augment: bool = False):
        self.length, self.augment = length, augment

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = [torch.rand(()).item(), np.random.rand(), random.random()] if self.augment else [0.0, 0.0, 0.0]
        return torch.tensor([float(index), *noise], dtype=torch.float64)


class EvenFirst(Sampler):
    """A sampler of a user's own, which shuffles by the global random numbers of two libraries."""

    def __init__(self, length: int, sized: bool = True):
        self.length, self.epochs = length, []
        self.generator = torch.Generator().manual_seed(1)
        if sized:
            self.__class__ = SizedEvenFirst

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self):
        odd = [*range(1, self.length, 2)]
        np.random.shuffle(odd)
        even = [2 * i for i in torch.randperm((self.length + 1) // 2, generator=self.generator).tolist()]
        random.shuffle(even)
        yield from even + odd


class SizedEvenFirst(EvenFirst):
    def __len__(self) -> int:
        return self.length


def open_ranks(loader, world_size, **options):
    options = {"seed": 5} | options
    return [TrainBatches(loader, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def samples_of(batch):
    if batch.data is None:
        return []
    data = batch.data[0] if isinstance(batch.data, list) else batch.data
    return (data[:, 0] if data.ndim == 2 else data).int().tolist()


def read_steps(ranks, epoch=0, start=0, num_steps=None):
    """Samples of each step, those of rank 0 first; all ranks must have as many steps."""
    read = [list(rank.iterate(epoch, start)) for rank in ranks]
    assert len({len(batches) for batches in read}) == 1
    for batches in zip(*read, strict=True):
        assert len({(batch.index, batch.uneven, batch.last) for batch in batches}) == 1
        assert all((batch.data is None) == (batch.size == 0) for batch in batches)
        assert all(len(samples_of(batch)) == batch.size for batch in batches)
        assert batches[0].uneven == any(batch.size == 0 for batch in batches)
        if ranks[0].accumulate == 1:
            assert sum(batch.share for batch in batches) == pytest.approx(len(ranks))
    if read[0]:
        assert [batch.last for batch in read[0]] == [False] * (len(read[0]) - 1) + [True]
    return [[s for batch in batches for s in samples_of(batch)] for batches in zip(*read, strict=True)][:num_steps]


def flat(steps):
    return [sample for step in steps for sample in step]


LOADERS = {
    "in order": lambda n: DataLoader(Numbers(n), batch_size=4),
    "shuffled": lambda n: DataLoader(Numbers(n), batch_size=4, shuffle=True),
    "rows in order": lambda n: DataLoader(TensorDataset(torch.arange(n)), batch_size=4),
    "rows shuffled": lambda n: DataLoader(TensorDataset(torch.arange(n)), batch_size=4, shuffle=True),
    "own sampler": lambda n: DataLoader(Numbers(n), batch_size=4, sampler=EvenFirst(n)),
    "own sampler without length": lambda n: DataLoader(Numbers(n), batch_size=4, sampler=EvenFirst(n, sized=False)),
    "subset": lambda n: DataLoader(Numbers(n), batch_size=4, sampler=SubsetRandomSampler(range(n))),
    "weighted": lambda n: DataLoader(
        Numbers(n), batch_size=4, sampler=WeightedRandomSampler([1.0] * n, n, replacement=False)
    ),
    "distributed": lambda n: DataLoader(
        Numbers(n), batch_size=4, sampler=DistributedSampler(range(n), num_replicas=2, rank=0, shuffle=True)
    ),
    "several loader workers": lambda n: DataLoader(Numbers(n), batch_size=4, shuffle=True, num_workers=2),
}


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "several loader workers"])
@pytest.mark.parametrize("length", [1, 5, 41, 103])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_number_of_workers_follows_one_process(kind, length, world_size):
    for epoch in (0, 3):
        steps = read_steps(open_ranks(LOADERS[kind](length), world_size), epoch)
        assert sorted(flat(steps)) == list(range(length))
        one = read_steps(open_ranks(LOADERS[kind](length), 1), epoch)
        assert flat(steps) == flat(one)
        assert [len(step) for step in steps[:-1]] == [4 * world_size] * (len(steps) - 1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_loader_workers_change_nothing(world_size):
    loaders = [LOADERS[kind](41) for kind in ("shuffled", "several loader workers")]
    first, second = (read_steps(open_ranks(loader, world_size), epoch=1) for loader in loaders)
    assert first == second


@pytest.mark.parametrize("kind", LOADERS)
def test_workers_come_and_go_in_the_middle_of_an_epoch(kind):
    """4 -> 2 -> 3 -> 1 workers: each sample exactly once, in the order of an epoch that was never stopped."""
    length, position, seen = 103, 0, []
    state = {"position": 0, "unit": "samples", "world_size": 4}
    for world_size, num_steps in ((4, 2), (2, 3), (3, 2), (1, None)):
        ranks = open_ranks(LOADERS[kind](length), world_size)
        for rank in ranks:
            rank.load_state_dict(state)
        position = ranks[0].position
        steps = read_steps(ranks, 2, position, num_steps)
        first = ranks[0].source.index_at(position)
        state = ranks[0].state_dict(2, first + len(steps) - 1)
        seen += flat(steps)
        assert min(state["position"], length) == len(seen)
    assert seen == flat(read_steps(open_ranks(LOADERS[kind](length), 1), 2))


def test_a_position_is_kept_until_the_first_batch_of_another_number_of_workers():
    state = {"position": 48, "unit": "samples", "world_size": 2}
    batches = open_ranks(LOADERS["shuffled"](103), 4)[0]
    batches.load_state_dict(state)
    assert batches.first_index == 3
    assert batches.state_dict(0, 5)["position"] == 48  # index 5 is what two workers had come to
    entered = batches.iterate(0, batches.position)
    assert batches.state_dict(0, 5)["position"] == 48
    assert batches.state_dict(0, next(entered).index)["position"] == 64


def test_an_epoch_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return flat(read_steps(open_ranks(LOADERS["shuffled"](50), 2, seed=seed), epoch))

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


def test_drop_last_drops_what_does_not_fill_a_step_of_all_workers():
    for world_size in WORLD_SIZES:
        ranks = open_ranks(DataLoader(Numbers(103), batch_size=4, drop_last=True), world_size)
        steps = read_steps(ranks)
        assert flat(steps) == list(range(103 - 103 % (4 * world_size)))
        assert ranks[0].num_batches == len(steps)
    # entered in the middle, the rest is what is dropped
    ranks = open_ranks(DataLoader(Numbers(103), batch_size=4, drop_last=True), 3)
    assert flat(read_steps(ranks, start=50)) == list(range(50, 98))
    assert ranks[0].position_after(50 // 12 + 3) == 98


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_num_batches_counts_the_steps_of_a_rank(world_size):
    for length in (1, 5, 41, 103):
        for limit in (1.0, 3, 0.5):
            total = -(-length // (4 * world_size))
            if limit == 0.5 and total < 2:
                continue
            ranks = open_ranks(LOADERS["shuffled"](length), world_size, limit=limit)
            assert len(read_steps(ranks)) == ranks[0].num_batches == num_limited(limit, total)


def test_an_endless_sampler_needs_a_limit_and_keeps_to_it():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield from torch.randperm(10).tolist()

    ranks = open_ranks(DataLoader(Numbers(10), batch_size=4, sampler=Endless()), 2, limit=6)
    steps = read_steps(ranks)
    assert [len(step) for step in steps] == [8] * 6
    assert sorted(flat(steps)[:40]) == sorted([*range(10)] * 4)
    with pytest.raises(DataError, match="length is unknown"):
        open_ranks(DataLoader(Numbers(10), batch_size=4, sampler=Endless()), 2, limit=0.5)


def test_a_users_sampler_is_told_the_epoch_and_its_generator_is_left_as_it_was():
    sampler = EvenFirst(20)
    before = sampler.generator.get_state()
    read_steps(open_ranks(DataLoader(Numbers(20), batch_size=4, sampler=sampler), 1), epoch=7)
    assert sampler.epochs == [7]
    assert torch.equal(sampler.generator.get_state(), before)


def test_a_weighted_sampler_draws_alike_on_all_ranks():
    sampler = WeightedRandomSampler([1.0] * 10 + [9.0] * 10, 400)
    loader = DataLoader(Numbers(20), batch_size=4, sampler=sampler)
    steps = [read_steps(open_ranks(loader, world_size)) for world_size in WORLD_SIZES]
    assert all(flat(each) == flat(steps[0]) for each in steps)
    counts = Counter(sample >= 10 for sample in flat(steps[0]))
    assert counts[True] > 4 * counts[False]


def test_random_sampler_with_replacement_draws_as_many_as_asked():
    loader = DataLoader(Numbers(20), batch_size=4, sampler=RandomSampler(range(20), replacement=True, num_samples=33))
    one, three = (flat(read_steps(open_ranks(loader, world_size))) for world_size in (1, 3))
    assert one == three
    assert len(one) == 33
    assert len(set(one)) < 20


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_users_batch_sampler_is_dealt_whole(world_size):
    class Buckets(Sampler):
        def __iter__(self):
            for low, size in ((0, 5), (5, 1), (6, 4), (10, 2), (12, 3)):
                yield [*range(low, low + size)]

        def __len__(self):
            return 5

    ranks = open_ranks(DataLoader(Numbers(15), batch_sampler=Buckets()), world_size)
    read = [list(rank.iterate(0)) for rank in ranks]
    assert len(read[0]) == ranks[0].num_batches == -(-5 // world_size)
    batches = [samples_of(batch) for step in zip(*read, strict=True) for batch in step if batch.size]
    assert batches == list(Buckets())
    for step in zip(*read, strict=True):
        total = sum(batch.size for batch in step)
        assert [batch.share for batch in step] == [batch.size * world_size / total for batch in step]
    assert ranks[0].state_dict(0, 0) == {"position": world_size, "unit": "batches", "world_size": world_size}
    assert ranks[-1].indices(0, 0) == list(Buckets())[world_size - 1]
    with pytest.raises(InvalidArguments, match="batch sampler of its own"):
        open_ranks(DataLoader(Numbers(15), batch_sampler=Buckets()), 2, global_batch_size=8)


def test_a_loader_that_makes_no_batches_gives_a_sample_at_a_time():
    ranks = open_ranks(DataLoader(Numbers(5), batch_size=None), 2)
    read = [[batch.data[0].item() if batch.size else None for batch in rank.iterate(0)] for rank in ranks]
    assert read == [[0.0, 2.0, 4.0], [1.0, 3.0, None]]
    pairs = DataLoader(Numbers(5), batch_size=None, sampler=BatchSampler(range(5), 2, drop_last=False))

    class ByList(Numbers):
        def __getitem__(self, indices):
            return torch.stack([super(ByList, self).__getitem__(index) for index in indices])

    pairs = DataLoader(ByList(5), batch_size=None, sampler=BatchSampler(range(5), 2, drop_last=False))
    assert flat(read_steps(open_ranks(pairs, 2))) == [0, 1, 2, 3, 4]


def test_without_the_distributed_sampler_each_rank_goes_through_the_whole_loader():
    ranks = open_ranks(LOADERS["shuffled"](20), 2, use_distributed_sampler=False)
    read = [[samples_of(batch) for batch in rank.iterate(0)] for rank in ranks]
    assert read[0] == read[1]
    assert sorted(flat(read[0])) == list(range(20))
    assert ranks[0].num_batches == 5
    assert {batch.share for batch in ranks[0].iterate(0)} == {1.0}
    assert ranks[0].state_dict(0, 1)["position"] == 2 * 2 * 4
    assert [samples_of(batch) for batch in ranks[0].iterate(0, start=16)] == read[0][2:]


def test_a_distributed_sampler_of_the_users_own_divides_and_all_ranks_end_with_the_first():
    class Uneven(DistributedSampler):
        def __iter__(self):
            return iter(range(12) if self.rank == 0 else range(12, 20))

        def __len__(self):
            return 12 if self.rank == 0 else 8

    votes = []
    read = []
    for rank in range(2):
        sampler = Uneven(range(20), num_replicas=2, rank=rank)
        batches = TrainBatches(DataLoader(Numbers(20), batch_size=4, sampler=sampler), rank=rank, world_size=2, seed=0)
        other = iter([True, True, False]) if rank == 0 else iter([True, True, True])

        def agree(flag, other=other):
            votes.append(flag)
            return flag and next(other)

        read.append(list(batches.iterate(0, agree=agree)))
    assert [[samples_of(batch) for batch in rank] for rank in read] == [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[12, 13, 14, 15], [16, 17, 18, 19]],
    ]
    assert [batch.last for batch in read[0]] == [batch.last for batch in read[1]] == [False, True]
    assert votes == [True, True, True, True, True, False]


def test_overfit_takes_the_same_batches_in_order_in_every_epoch():
    ranks = open_ranks(LOADERS["rows shuffled"](50), 2, overfit=True, limit=2)
    assert read_steps(ranks, 0) == read_steps(ranks, 5) == [[*range(8)], [*range(8, 16)]]
    own = open_ranks(LOADERS["own sampler"](50), 2, overfit=True, limit=2)
    assert read_steps(own, 0) == read_steps(own, 5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_global_batch_stays_the_same_with_any_number_of_workers(world_size):
    loader = LOADERS["rows shuffled"](103)
    ranks = open_ranks(loader, world_size, global_batch_size=24)
    accumulate = ranks[0].accumulate
    steps = read_steps_of_windows(ranks, accumulate)
    order = flat(read_steps(open_ranks(loader, 1)))
    assert [sorted(step) for step in steps] == [sorted(order[low : low + 24]) for low in range(0, 103, 24)]
    for index in range(0, ranks[0].num_batches, accumulate):
        assert ranks[0].state_dict(0, index + accumulate - 1)["position"] == min(24 * (index // accumulate + 1), 103)
    # a window later, with another number of workers
    other = open_ranks(loader, 5 - min(world_size, 4), global_batch_size=24)
    assert flat(read_steps(other, start=48)) == order[48:]


def read_steps_of_windows(ranks, accumulate):
    read = [list(rank.iterate(0)) for rank in ranks]
    samples = [[s for batch in batches for s in samples_of(batch)] for batches in zip(*read, strict=True)]
    return [flat(samples[low : low + accumulate]) for low in range(0, len(samples), accumulate)]


def test_the_indices_of_a_batch_are_found_again():
    for kind in ("in order", "shuffled", "own sampler", "rows shuffled"):
        for options in ({}, {"global_batch_size": 10}):
            ranks = open_ranks(LOADERS[kind](41), 3, **options)
            for rank in ranks:
                for batch in rank.iterate(1, start=20):
                    assert rank.indices(1, batch.index) == samples_of(batch)
                assert rank.indices(1, 1000) is None
    subset = DataLoader(Subset(TensorDataset(torch.arange(10)), [9, 7, 5, 3]), batch_size=2)
    assert open_ranks(subset, 1)[0].indices(0, 1) == [2, 3]


class Stateful(Sampler):
    """Forty samples in epochs of eight."""

    def __init__(self):
        self.given = 0

    def __len__(self):
        return 8

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


class Curriculum(Stateful):
    """Each epoch begins where the one before ended."""

    def __iter__(self):
        self.given += 8
        yield from (index % 40 for index in range(self.given - 8, self.given))


class Counting(Stateful):
    """Its state is its place in the epoch, as with the samplers of torchdata."""

    def load_state_dict(self, state):
        self.skipped = state["given"]

    def __iter__(self):
        self.given, self.skipped = getattr(self, "skipped", 0), 0
        for index in range(self.given, 8):
            self.given += 1
            yield index


@pytest.mark.parametrize("kind", [Curriculum, Counting])
@pytest.mark.parametrize("finished", [None, 0, 1])
def test_a_stateful_sampler_goes_on_from_the_middle_and_from_the_end_of_an_epoch(kind, finished):
    def make():
        return open_ranks(DataLoader(Numbers(40), batch_size=2, sampler=kind()), 2)[0]

    def read(batches, epoch, start=0):
        return [samples_of(batch) for batch in batches.iterate(epoch, start)]

    batches = make()
    for epoch in range(2):
        assert len(read(batches, epoch)) == 2
    state = batches.state_dict(2)
    expected = []
    for index, batch in enumerate(batches.iterate(2)):
        expected.append(samples_of(batch))
        if index == finished:
            state = batches.state_dict(2, finished)
    assert state["sampler"] == {"given": 16 if kind is Curriculum else 8}
    expected += read(batches, 3)
    resumed = make()
    resumed.load_state_dict(state)
    done = 0 if finished is None else finished + 1
    assert [*read(resumed, 2, resumed.position), *read(resumed, 3)] == expected[done:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_process_random_numbers_are_left_alone(num_workers):
    """What a dataset draws in this process aside, nothing of the loader's machinery may draw."""
    datasets = {"slow": Numbers(20), "rows": TensorDataset(torch.arange(20))}
    for dataset in datasets.values():
        loader = DataLoader(dataset, batch_size=4, sampler=EvenFirst(20), num_workers=num_workers)
        before = rng_state()
        np.random.randn()  # leaves one of a pair of normal numbers in store
        stored = rng_state()
        read_steps(open_ranks(loader, 2), epoch=1)
        after = rng_state()
        assert str(after["numpy"]) == str(stored["numpy"]) != str(before["numpy"])
        assert torch.equal(after["python"]["words"], stored["python"]["words"])
        assert torch.equal(after["torch"], stored["torch"])


@pytest.mark.parametrize("persistent", [False, True])
def test_augmentation_in_loader_workers_is_the_same_after_a_resume(persistent):
    loader = DataLoader(
        Numbers(40, augment=True), batch_size=4, shuffle=True, num_workers=2, persistent_workers=persistent
    )

    def read(batches, epoch, start=0):
        return {batch.index: batch.data for batch in batches.iterate(epoch, start)}

    for rank in range(2):
        batches = TrainBatches(loader, rank=rank, world_size=2, seed=1)
        epochs = [read(batches, epoch) for epoch in range(2)]
        resumed = read(TrainBatches(loader, rank=rank, world_size=2, seed=1), 1, start=24)
        assert list(resumed) == [3, 4]
        assert all(torch.equal(data, epochs[1][index]) for index, data in resumed.items())
        noise = torch.cat([data[:, 1:] for epoch in epochs for data in epoch.values()])
        assert noise.unique().numel() == noise.numel()  # no two samples were augmented alike


def test_ranks_augment_differently_in_loader_workers():
    loader = DataLoader(Numbers(8, augment=True), batch_size=4, num_workers=1)
    first, second = (next(iter(rank.iterate(0))).data[:, 1:] for rank in open_ranks(loader, 2))
    assert not set(first.flatten().tolist()) & set(second.flatten().tolist())


def test_what_a_loader_was_given_is_kept():
    def init(worker):
        torch.zeros(()).fill_(worker)

    class Own(DataLoader):
        pass

    loader = Own(
        Numbers(10), batch_size=4, num_workers=1, worker_init_fn=init, collate_fn=torch.stack, timeout=60,
        prefetch_factor=3, multiprocessing_context="fork", pin_memory=False,
    )  # fmt: skip
    batches = TrainBatches(loader, rank=0, world_size=1, seed=0)
    read = [batch.data[:, 0].int().tolist() for batch in batches.iterate(0)]
    assert read == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    used = batches.source.slow.loader
    kept = ("worker_init_fn", "collate_fn", "timeout", "prefetch_factor", "multiprocessing_context", "num_workers")
    for name in kept:
        assert getattr(used, name) == getattr(loader, name)
    assert type(used) is Own
    assert loader.batch_sampler is not used.batch_sampler  # the user's own is as it was
    assert [batch.size(0) for batch in loader] == [4, 4, 2]


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (DataLoader(TensorDataset(torch.zeros(0)), batch_size=4), "is empty"),
        (DataLoader(Numbers(10), batch_size=4, drop_last=True), "10 samples do not fill one step of 12"),
        ([], "is empty"),
        (object(), "object is no loader"),
        ((iter(()) for _ in range(0)), "can be read once"),
    ],
    ids=["no samples", "all dropped", "no batches", "no loader", "used up"],
)
def test_data_that_gives_nothing_is_refused(loader, text):
    with pytest.raises(DataError, match=text):
        list(TrainBatches(loader, rank=0, world_size=3, seed=0).iterate(0))


def test_a_position_of_another_kind_of_loader_is_refused():
    batches = open_ranks(LOADERS["shuffled"](20), 1)[0]
    with pytest.raises(DataError, match="whose batches were counted"):
        batches.load_state_dict({"position": 3, "unit": "batches", "world_size": 1})


def test_a_limit_of_zero_leaves_nothing_and_is_no_error():
    ranks = open_ranks(LOADERS["shuffled"](20), 2, limit=0)
    assert ranks[0].num_batches == 0
    assert read_steps(ranks) == []


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("global_batch_size", [None, 12])
def test_shares_make_the_gradient_of_one_process(world_size, optimizer, global_batch_size):
    """Fifty steps over data that nothing divides: the mean over ranks, as DDP takes it, against one process."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(41, 5, generator=generator, dtype=torch.float64)
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())

    def train(world_size, batch_size, global_batch_size=None):
        loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)
        ranks = open_ranks(loader, world_size, global_batch_size=global_batch_size)
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 1, dtype=torch.float64)
        steps, updates = optimizer(model.parameters(), lr=0.05), 0
        for epoch in range(20):
            for batches in zip(*[rank.iterate(epoch) for rank in ranks], strict=True):
                for batch in batches:
                    if batch.size:
                        loss = torch.nn.functional.mse_loss(model(batch.data[0]), batch.data[1])
                        (loss * batch.share / ranks[0].accumulate / world_size).backward()
                if (batches[0].index + 1) % ranks[0].accumulate == 0 or batches[0].last:
                    steps.step()
                    steps.zero_grad()
                    updates += 1
        assert updates >= 50
        return model.weight

    if global_batch_size is None:
        many, one = train(world_size, 2), train(1, 2 * world_size)
    else:
        many, one = train(world_size, 2, global_batch_size), train(1, global_batch_size)
    assert torch.allclose(many, one, rtol=0, atol=1e-12)
