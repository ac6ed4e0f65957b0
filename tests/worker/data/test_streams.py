"""Streams: each item once over ranks and loader workers, in the order of one process, and resumed exactly."""

from __future__ import annotations

import random
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.datapipes.iter import IterableWrapper

from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.seeding import rng_state
from raylight.worker.data.batches import TrainBatches

# Three loader workers are one more than a small machine has processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Counting(IterableDataset):
    """0, 1, 2, … as a plain generator that knows nothing of workers."""

    def __init__(self, length: int):
        self.length = length

    def __iter__(self):
        for index in range(self.length):
            yield torch.tensor(index)


class Shuffling(Counting):
    """Shuffles through a buffer and augments, by the global random numbers of all three libraries."""

    def __iter__(self):
        buffer = []
        for index in range(self.length):
            buffer.append(index)
            if len(buffer) == 8:
                yield self.augment(buffer.pop(random.randrange(8)))
        np.random.shuffle(buffer)
        yield from map(self.augment, buffer)

    def augment(self, index):
        return torch.tensor([float(index), torch.rand(()).item()], dtype=torch.float64)


class ByWorker(Counting):
    """Divides itself among loader workers, as torch's documentation shows."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, self.length, step):
            yield torch.tensor([float(index), torch.rand(()).item()], dtype=torch.float64)


class Told(Counting):
    rank, world_size = 0, 1

    def set_rank(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def __iter__(self):
        yield from map(torch.tensor, range(self.rank, self.length, self.world_size))


def divide_in_init(worker):
    info = get_worker_info()
    dataset = info.dataset
    dataset.part = range(info.id, dataset.length, info.num_workers)


class DividedInInit(Counting):
    part = None

    def __iter__(self):
        yield from map(torch.tensor, self.part)


def open_ranks(loader, world_size, **options):
    return [TrainBatches(loader, rank=r, world_size=world_size, **({"seed": 5} | options)) for r in range(world_size)]


def items_of(batch):
    if batch.data is None:
        return []
    return (batch.data[:, 0] if batch.data.ndim == 2 else batch.data.reshape(-1)).int().tolist()


def flat(steps):
    return [item for step in steps for item in step]


def read_steps(ranks, epoch=0, start=0):
    read = [list(rank.iterate(epoch, start)) for rank in ranks]
    assert len({len(batches) for batches in read}) == 1
    for batches in zip(*read, strict=True):
        assert len({(batch.index, batch.uneven, batch.last) for batch in batches}) == 1
        assert all(len(items_of(batch)) == batch.size for batch in batches)
        assert batches[0].uneven == any(batch.size == 0 for batch in batches)
        if ranks[0].accumulate == 1:
            assert sum(batch.share for batch in batches) == pytest.approx(len(ranks))
    return [sorted(item for batch in step for item in items_of(batch)) for step in zip(*read, strict=True)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("length", "world_size"), [(1, 1), (1, 3), (23, 1), (23, 3), (24, 2), (29, 4)])
def test_each_item_once_and_the_steps_of_one_process(length, world_size, num_workers):
    ranks = open_ranks(DataLoader(Counting(length), batch_size=3, num_workers=num_workers), world_size)
    step = 3 * world_size
    assert read_steps(ranks) == [[*range(low, min(low + step, length))] for low in range(0, length, step)]
    assert ranks[0].num_batches is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_that_shuffles_is_the_same_on_all_ranks_and_differs_between_epochs(num_workers):
    loader = DataLoader(Shuffling(40), batch_size=2, num_workers=num_workers)
    steps = {
        (world_size, epoch): read_steps(open_ranks(loader, world_size), epoch)
        for world_size in (1, 2, 4)
        for epoch in (0, 1)
    }
    for (world_size, epoch), read in steps.items():
        assert sorted(item for step in read for item in step) == list(range(40))
        one = [item for step in steps[1, epoch] for item in step]
        assert read == [sorted(one[low : low + 2 * world_size]) for low in range(0, 40, 2 * world_size)]
    assert steps[1, 0] != steps[1, 1]


def test_loader_workers_change_nothing_of_a_stream():
    read = [
        [(batch.index, items_of(batch), batch.last) for batch in open_ranks(DataLoader(
            Shuffling(30), batch_size=4, num_workers=num_workers), 2)[1].iterate(3)]
        for num_workers in (0, 1, 3)
    ]  # fmt: skip
    assert read[0] == read[1] == read[2]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_drop_last_drops_what_does_not_fill_a_step_of_all_workers(world_size, num_workers):
    loader = DataLoader(Counting(29), batch_size=3, drop_last=True, num_workers=num_workers)
    step = 3 * world_size
    assert flat(read_steps(open_ranks(loader, world_size))) == list(range(29 - 29 % step))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_dataset_that_asks_for_its_worker_is_told_its_place_among_all(world_size, num_workers):
    loader = DataLoader(ByWorker(36), batch_size=3, num_workers=num_workers)
    read = [list(rank.iterate(0, agree=lambda flag: flag)) for rank in open_ranks(loader, world_size)]
    seen = [item for rank in read for batch in rank for item in items_of(batch)]
    assert sorted(seen) == list(range(36))
    assert len({len(rank) for rank in read}) == 1
    noise = torch.cat([batch.data[:, 1] for rank in read for batch in rank])
    assert noise.unique().numel() >= 36 - 6  # but for the items read before the dataset had asked


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_dataset_may_be_divided_in_worker_init_fn(world_size):
    loader = DataLoader(DividedInInit(24), batch_size=3, num_workers=2, worker_init_fn=divide_in_init)
    assert sorted(flat(read_steps(open_ranks(loader, world_size)))) == list(range(24))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_dataset_with_set_rank_is_told(world_size):
    assert sorted(flat(read_steps(open_ranks(DataLoader(Told(24), batch_size=2), world_size)))) == list(range(24))


def test_a_dataset_that_is_sharded_already_is_left_alone():
    dataset = Counting(6)
    dataset.raylight_sharded = True
    for rank in open_ranks(DataLoader(dataset, batch_size=2), 2):
        assert [items_of(batch) for batch in rank.iterate(0)] == [[0, 1], [2, 3], [4, 5]]
    whole = open_ranks(DataLoader(Counting(6), batch_size=2), 2, use_distributed_sampler=False)
    assert [[items_of(batch) for batch in rank.iterate(0)] for rank in whole] == [[[0, 1], [2, 3], [4, 5]]] * 2


def test_ranks_of_different_length_end_at_the_same_step():
    """Two ranks whose data differ, in lockstep: what one says is what the other hears."""

    def run(lengths):
        ranks = []
        for rank, length in enumerate(lengths):
            dataset = Counting(length)
            dataset.raylight_sharded = True
            ranks.append(TrainBatches(DataLoader(dataset, batch_size=2), rank=rank, world_size=2, seed=0))
        ends = [[-(-length // 2) > k for k in range(20)] for length in lengths]
        votes = [all(flags) for flags in zip(*ends, strict=True)]
        result = []
        for batches, own in zip(ranks, ends, strict=True):
            said = []

            def agree(flag, said=said):
                said.append(flag)
                return votes[len(said) - 1]

            result.append([(batch.index, items_of(batch), batch.last) for batch in batches.iterate(0, agree=agree)])
            assert said == own[: len(said)]
            assert len(said) == votes.index(False) + 1
        return result

    assert run([7, 4]) == [[(0, [0, 1], False), (1, [2, 3], True)]] * 2
    assert [len(rank) for rank in run([5, 5])] == [3, 3]


def test_no_rank_trains_where_one_has_nothing():
    batches = TrainBatches(DataLoader(Counting(6), batch_size=2), rank=0, world_size=2, seed=0)
    with pytest.raises(DataError, match="gave no batch in epoch 0"):
        list(batches.iterate(0, agree=lambda flag: False))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_come_and_go_in_the_middle_of_an_epoch(num_workers):
    loader = DataLoader(Shuffling(50), batch_size=2, num_workers=num_workers)
    state, seen = {"position": 0, "unit": "samples", "world_size": 4}, []
    for world_size, num_steps in ((4, 2), (2, 3), (3, 1), (1, None)):
        ranks = open_ranks(loader, world_size)
        for rank in ranks:
            rank.load_state_dict(state)
        position = ranks[0].position
        steps = read_steps(ranks, 1, position)[:num_steps]
        seen += flat(steps)
        state = ranks[0].state_dict(1, ranks[0].source.index_at(position) + len(steps) - 1)
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("kind", [Shuffling, ByWorker])
def test_a_resumed_epoch_is_bit_for_bit_the_rest_of_one_that_was_never_stopped(kind, num_workers):
    def collate(items):  # draws too, in a loader worker
        batch = torch.stack(items)
        return torch.cat([batch, torch.rand(len(batch), 1, dtype=torch.float64)], 1) if get_worker_info() else batch

    loader = DataLoader(kind(60), batch_size=2, num_workers=num_workers, collate_fn=collate)
    for rank in range(2):
        whole = [batch.data for batch in open_ranks(loader, 2)[rank].iterate(4)]
        for done in (1, 2, 5, 6):
            batches = open_ranks(loader, 2)[rank]
            batches.load_state_dict({"position": done * 4, "unit": "samples", "world_size": 2})
            told = []
            rest = list(batches.iterate(4, batches.position, progress=lambda *told_: told.append(told_)))  # noqa: B023
            assert [batch.index for batch in rest] == list(range(done, len(whole)))
            assert all(torch.equal(a.data, b) for a, b in zip(rest, whole[done:], strict=True))
            assert told[-1][0] == told[-1][1]


def test_persistent_loader_workers_hear_of_the_next_epoch_and_of_where_it_begins():
    loader = DataLoader(Shuffling(24), batch_size=2, num_workers=2, persistent_workers=True)
    fresh = DataLoader(Shuffling(24), batch_size=2, num_workers=2)
    kept = open_ranks(loader, 2)[0]
    for epoch, start in ((0, 0), (1, 8), (2, 0)):
        expected = [items_of(batch) for batch in open_ranks(fresh, 2)[0].iterate(epoch, start)]
        assert [items_of(batch) for batch in kept.iterate(epoch, start)] == expected


class Stateful(Counting):
    """Remembers where it is, and draws a random number for each item."""

    def __init__(self, length):
        super().__init__(length)
        self.next, self.num_read = 0, 0

    def __iter__(self):
        begin, self.next = self.next, 0
        for index in range(begin, self.length):
            self.here = index + 1
            self.num_read += 1
            yield torch.tensor([float(index), torch.rand(()).item()], dtype=torch.float64)

    def state_dict(self):
        return {"next": self.here}

    def load_state_dict(self, state):
        self.next = state["next"]


@pytest.mark.parametrize("as_loader", [False, True], ids=["dataset", "loader of batches"])
def test_a_stateful_stream_is_asked_and_not_read_again(as_loader):
    def make():
        source = Stateful(30)
        return source, open_ranks(source if as_loader else DataLoader(source, batch_size=2), 1)[0]

    _, batches = make()
    whole = [batch.data for batch in batches.iterate(2)]
    _, stopped = make()
    reading = stopped.iterate(2)
    for _ in range(4):
        index = next(reading).index
    state = stopped.state_dict(2, index)
    assert state["position"] == (4 if as_loader else 8) == state["stream"]["source"]["next"]
    source, resumed = make()
    resumed.load_state_dict(state)
    rest = [batch.data for batch in resumed.iterate(2, resumed.position)]
    assert source.num_read == 30 - state["position"]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[4:], strict=True))
    # the next epoch begins at its beginning
    assert len(list(resumed.iterate(3))) == len(whole)


def test_the_process_random_numbers_are_left_alone():
    for loader in (DataLoader(Shuffling(20), batch_size=3), DataLoader(Shuffling(20), batch_size=3, num_workers=1)):
        before = rng_state()
        read_steps(open_ranks(loader, 2))
        after = rng_state()
        assert str(after["numpy"]) == str(before["numpy"])
        assert torch.equal(after["python"]["words"], before["python"]["words"])
        assert torch.equal(after["torch"], before["torch"])


def test_what_a_collate_function_draws_here_is_drawn_when_the_batch_is_due():
    """Reading ahead must not draw: a run that is resumed has not read ahead before it."""

    def collate(items):
        return torch.rand(len(items))

    loader = DataLoader(Counting(12), batch_size=2, collate_fn=collate)
    torch.manual_seed(0)
    read = []
    for batch in TrainBatches(loader, rank=0, world_size=1, seed=0).iterate(0):
        read += [batch.data, torch.rand(1)]
    torch.manual_seed(0)
    assert torch.equal(torch.cat(read), torch.cat([torch.rand(n) for _ in range(6) for n in (2, 1)]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_iterable_of_batches_is_dealt(world_size):
    batches = [torch.arange(low, low + size) for low, size in ((0, 4), (4, 4), (8, 2), (10, 4), (14, 1))]

    class Loader:
        def __iter__(self):
            return iter(batches)

        def __len__(self):
            return 5

    for loader in (batches, Loader()):
        ranks = open_ranks(loader, world_size)
        assert ranks[0].num_batches == -(-5 // world_size)
        assert read_steps(ranks) == [
            torch.cat(batches[low : low + world_size]).tolist() for low in range(0, 5, world_size)
        ]
        assert ranks[0].state_dict(0, 0) == {"position": world_size, "unit": "batches", "world_size": world_size}
        assert flat(read_steps(ranks, start=3)) == list(range(10, 15))
    assert [len(read_steps(open_ranks(batches, 2, limit=limit))) for limit in (2, 0.5, 1.0)] == [2, 1, 3]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_global_batch_of_a_stream_stays_the_same(world_size, num_workers):
    loader = DataLoader(Counting(35), batch_size=4, num_workers=num_workers)
    ranks = open_ranks(loader, world_size, global_batch_size=10)
    accumulate = ranks[0].accumulate
    read = [list(rank.iterate(0)) for rank in ranks]
    for window in range(4):
        batches = [b for rank in read for b in rank[window * accumulate : (window + 1) * accumulate]]
        items = [float(item) for batch in batches for item in items_of(batch)]
        assert sorted(items) == [*range(window * 10, min(window * 10 + 10, 35))]
        gradient = sum(b.share * b.data.float().mean().item() for b in batches if b.size) / accumulate / world_size
        assert gradient == pytest.approx(sum(items) / len(items))
    with pytest.raises(InvalidArguments, match="makes its own batches"):
        open_ranks([1, 2], 1, global_batch_size=4)


def test_a_stream_with_a_length_says_how_many_steps_there_are():
    class Sized(Counting):
        def __len__(self):
            return self.length

    assert open_ranks(DataLoader(Sized(29), batch_size=3), 2)[0].num_batches == 5
    assert open_ranks(DataLoader(Sized(29), batch_size=3, drop_last=True), 2)[0].num_batches == 4
    assert len(read_steps(open_ranks(DataLoader(Sized(29), batch_size=3), 2, limit=0.5))) == 2
    with pytest.raises(DataError, match="length is unknown"):
        open_ranks(DataLoader(Counting(29), batch_size=3), 2, limit=0.5)


def test_a_limited_stream_is_not_read_beyond_its_limit():
    source = Stateful(100)
    steps = list(open_ranks(DataLoader(source, batch_size=2), 1, limit=3)[0].iterate(0))
    assert [batch.last for batch in steps] == [False, False, True]
    assert source.num_read == 6


def test_set_epoch_is_called():
    class Epochs(Counting):
        def set_epoch(self, epoch):
            self.length = 2 * (epoch + 1)

    for num_workers in (0, 1):
        batches = open_ranks(DataLoader(Epochs(0), batch_size=2, num_workers=num_workers), 1)[0]
        assert [len(list(batches.iterate(epoch))) for epoch in (0, 1, 4)] == [1, 2, 5]


def count_steps(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def agree(flag):
        vote = torch.tensor(int(flag))
        dist.all_reduce(vote, op=dist.ReduceOp.MIN)
        return bool(vote)

    dataset = Counting(9 if rank == 0 else 5)
    dataset.raylight_sharded = True
    batches = TrainBatches(DataLoader(dataset, batch_size=2), rank=rank, world_size=2, seed=0)
    total = torch.zeros(())
    for batch in batches.iterate(0, agree=agree):
        dist.all_reduce(total)  # would wait for ever if the other rank had ended
        results.put((rank, batch.index, batch.last))
    dist.destroy_process_group()


def test_two_processes_of_different_length_end_without_a_hang():
    context = torch.multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    processes = [context.Process(target=count_steps, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in range(6))
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert found == [(rank, index, index == 2) for rank in range(2) for index in range(3)]


def test_loader_workers_that_are_spawned():
    source = IterableWrapper(range(10), deepcopy=False)
    loader = DataLoader(source, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert flat(items_of(batch) for batch in open_ranks(loader, 1)[0].iterate(0)) == list(range(10))
