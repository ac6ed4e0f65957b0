"""Data that comes as a stream: an IterableDataset, or any iterable of batches, divided over ranks and loader workers.

Every process that reads goes through the whole stream and keeps what is its own, so that each sample is used exactly
once and the order is that of one process. A dataset that can do better takes its place over:

- it reads `torch.utils.data.get_worker_info().num_workers`, as torch's documentation asks, while it is iterated or in
  `worker_init_fn`: it is told its place among the loader workers of all ranks;
- it has `set_rank(rank, world_size)`: it is told, and divides among loader workers by `get_worker_info`, if at all;
- it says `raylight_sharded = True`: it is left alone. A dataset that asks torch.distributed for its rank must say so.

A dataset with `set_epoch(epoch)` hears the epoch. All processes draw the same random numbers while they read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as loader_worker

from raylight.contract.kinds import Batch, Dataset, Index
from raylight.user.transfer import batch_size_of
from raylight.worker.data.division import Division, Fetched, Step
from raylight.worker.data.random_stream import RandomStream, derive_seed, seed_process
from raylight.worker.data.sampling import is_stateful, length_of, samplers_of
from raylight.worker.data.source import StreamState, TrackProgress

PROGRESS_EVERY_S = 0.5


class ShardInfo:
    """What get_worker_info() answers to a user's stream; remembers whether it was asked how many share it."""

    def __init__(self, shard: int, num_shards: int, seed: int, dataset: Dataset):
        self.id, self.seed, self.dataset = shard, seed, dataset
        self.asked = False
        self._num_shards = num_shards

    @property
    def num_workers(self) -> int:
        self.asked = True
        return self._num_shards


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass through a stream: which, from where, and by which loader worker of the rank."""

    epoch: int
    cycle: int = 0
    start: int = 0
    worker: int = 0
    num_workers: int = 1
    track: TrackProgress | None = None
    state: StreamState | None = None  # what Stream.captured held at `start`, where the source is stateful


class Stream(IterableDataset[Fetched | None]):
    """The user's stream as this rank's steps; in a loader worker, as the batches that fall to that worker."""

    def __init__(
        self,
        source: Dataset,
        division: Division,
        seed: int,
        *,
        collate: Callable[[list[Index]], Batch] | None = None,
        makes_batches: bool = False,
        drop_last: bool = False,
        is_whole: bool = False,
        for_evaluation: bool = False,
    ):
        self.source, self.division, self.seed = source, division, seed
        self.collate, self.makes_batches, self.drop_last = collate, makes_batches, drop_last
        self.for_evaluation = for_evaluation
        self.told = hasattr(source, "set_rank")
        # Whether all that comes from the source in this process is this rank's.
        self.is_whole = is_whole or self.told or getattr(source, "raylight_sharded", False)
        self.info: ShardInfo | None = None
        self.is_stateful = is_stateful(source)
        # Newest states of a stateful source, each with the position that it belongs to.
        self.captured: deque[tuple[int, StreamState]] = deque(maxlen=3)
        # Epoch, cycle and start, where loader workers that outlive an epoch find them.
        self.clock = torch.zeros(3, dtype=torch.int64)

    def forget_state(self) -> None:
        """The source's state is of no use here."""
        self.is_stateful = False

    def collate_units(self, units: list[Index]) -> Batch:
        batch = units if self.makes_batches else units[0]
        return batch if self.collate is None else self.collate(batch)

    def weigh(self, item: Index) -> int:
        return 1 if self.makes_batches else batch_size_of(item) or 1

    def shard_info(self, worker: int, num_workers: int) -> ShardInfo:
        if self.info is None:
            division = self.division.alone() if self.is_whole else self.division
            shard, num_shards = worker * division.world_size + division.rank, num_workers * division.world_size
            self.info = ShardInfo(shard, num_shards, derive_seed(self.seed, shard, "shard"), self.source)
        return self.info

    def __iter__(self) -> Iterator[Fetched | None]:
        """In a loader worker: its batches, each with its step; None takes the place of one from before `start`."""
        epoch, cycle, start = self.clock.tolist()
        place = get_worker_info()
        assert place is not None
        for step in self.read(Pass(epoch, cycle, start, place.id, place.num_workers)):
            if step is not None:
                shard = self.info.id if self.info is not None and self.is_whole else self.division.rank
                seed_process(derive_seed(self.seed, epoch, cycle, step.position, shard))
                yield step._replace(units=None), self.collate_units(step.units) if step.size else None
            else:
                yield None

    def read(self, way: Pass) -> Iterator[Step | None]:
        """Steps with their items, not collated. Those of one rank go round its loader workers."""
        if self.told:
            self.source.set_rank(self.division.rank, self.division.world_size)
        reader = Reader(self, way)
        self.is_whole = self.is_whole or reader.finds_divided()
        division, position = self.division, way.start
        if self.is_whole:
            replicas, division = division.world_size, division.alone()
            rounds, ahead = divmod(division.index_at(way.start // replicas), way.num_workers)
            if way.worker < ahead:
                yield None
            position = division.units_in(rounds + (way.worker < ahead))
        if way.state is None and position:
            reader.skip(position, way.track)
        if self.for_evaluation:
            yield from self._read_evaluation(reader, division, way)
        else:
            yield from self._read_training(reader, division, way, position)

    def _read_training(self, reader: Reader, division: Division, way: Pass, position: int) -> Iterator[Step]:
        number = 0
        while True:
            taken, num_read, total = [], 0, 0
            while num_read < division.window:
                wanted = min(division.step, division.window - num_read)
                mine, weight, count, weight_of_all = reader.take(wanted, division, self.weigh)
                if count:
                    taken.append((position + num_read, mine, weight, count))
                num_read, total = num_read + count, total + weight_of_all
                if count < wanted:
                    break
            if not num_read or (self.drop_last and num_read < division.window):
                return
            if self.is_stateful:
                replicas = self.division.world_size if self.is_whole else 1
                self.captured.append(((position + num_read) * replicas, reader.state_dict(self.is_whole)))
            factor = division.world_size * division.accumulate
            for at, mine, weight, count in taken:
                if self.is_whole or number % way.num_workers == way.worker:
                    yield Step(mine, weight, weight * factor / total, count < division.world_size, False, at)
                number += 1
            if num_read < division.window:
                return
            position += num_read

    def _read_evaluation(self, reader: Reader, division: Division, way: Pass) -> Iterator[Step]:
        """Batches as one process would make them; the position is the batch's index in that sequence."""
        index, size = 0, division.micro
        while True:
            items = reader.next_items(size)
            if not items or (self.drop_last and len(items) < size):
                return
            turn, rank = divmod(index, division.world_size)
            if rank == division.rank and (self.is_whole or turn % way.num_workers == way.worker):
                yield Step(items, sum(map(self.weigh, items)), 1.0, False, False, -1 if self.is_whole else index)
            index += 1


class Reader:
    """One pass of one process through the user's stream."""

    def __init__(self, stream: Stream, way: Pass):
        source = self.source = stream.source
        # A plain list draws no random numbers, and exchanging them would cost more than reading it.
        plain = type(source) in (list, tuple)
        seed = derive_seed(stream.seed, way.epoch, way.cycle, "stream")
        self.random: nullcontext[None] | RandomStream = nullcontext() if plain else RandomStream(seed)
        self.info = stream.shard_info(way.worker, way.num_workers)
        shared = way.num_workers > 1 or get_worker_info() is not None or stream.division.world_size > 1
        self.answers = shared and isinstance(source, IterableDataset)
        for hears in (source, *samplers_of(source)):
            if callable(getattr(hears, "set_epoch", None)):
                hears.set_epoch(way.epoch)
        with self:
            if way.state is not None:
                source.load_state_dict(way.state["source"])
            self.items: Iterator[Index] = iter(source)
        length = length_said(source)
        if length is not None:  # what would come after it is never asked for
            self.items = islice(self.items, max(length - (way.start if way.state is not None else 0), 0))
        if way.state is not None and isinstance(self.random, RandomStream):
            self.random.load_state_dict(way.state["random"])

    def __enter__(self) -> None:
        self.random.__enter__()
        if self.answers:
            self.torchs_info, loader_worker._worker_info = loader_worker._worker_info, self.info  # type: ignore[assignment]

    def __exit__(self, *error: Any) -> None:
        if self.answers:
            loader_worker._worker_info = self.torchs_info
        self.random.__exit__(*error)

    def finds_divided(self) -> bool:
        """Whether the dataset divides itself, which shows when its first item is read."""
        with self:
            self.items = chain(list(islice(self.items, 1)), self.items)
            if self.answers and self.info.asked:
                seed_process(self.info.seed)  # or every shard would be augmented alike
        return self.answers and self.info.asked

    def take(self, count: int, division: Division, weigh: Callable[[Index], int]) -> tuple[list[Index], int, int, int]:
        """Of the next `count` items this rank's, their weight, and number and weight of all that there were."""
        mine, weight, num_read, total = [], 0, 0, 0
        with self:
            for offset, item in zip(range(count), self.items, strict=False):
                num_read += 1
                weight_of_item = weigh(item)
                total += weight_of_item
                if offset % division.world_size == division.rank:
                    mine.append(item)
                    weight += weight_of_item
        return mine, weight, num_read, total

    def next_items(self, count: int) -> list[Index]:
        with self:
            return list(islice(self.items, count))

    def skip(self, count: int, track: TrackProgress | None) -> None:
        next_report = time.monotonic()
        with self:
            for passed, _ in enumerate(islice(self.items, count), 1):
                if track is not None and (passed == count or time.monotonic() >= next_report):
                    track(passed, count)
                    next_report = time.monotonic() + PROGRESS_EVERY_S

    def state_dict(self, is_whole: bool) -> StreamState:
        state: StreamState = {"source": self.source.state_dict(), "is_whole": is_whole}
        if isinstance(self.random, RandomStream):
            state["random"] = self.random.state_dict()
        return state


def length_said(source: Dataset) -> int | None:
    """How many items the author of a stream says that it has. DataLoader's own `__len__` says nothing about an
    `__iter__` that somebody else wrote."""
    if isinstance(source, DataLoader) and type(source).__len__ is DataLoader.__len__:
        return None
    return length_of(source)


class InitWorker:
    """Calls the user's worker_init_fn with what get_worker_info() would say if the loader had the user's dataset."""

    def __init__(self, function: Callable[[int], None]):
        self.function = function

    def __call__(self, worker: int) -> None:
        torchs_info = get_worker_info()
        assert torchs_info is not None
        assert isinstance(torchs_info.dataset, Stream)
        info = torchs_info.dataset.shard_info(worker, torchs_info.num_workers)
        loader_worker._worker_info = info  # type: ignore[assignment]
        try:
            self.function(worker)
        finally:
            loader_worker._worker_info = torchs_info


def give(data: Index) -> Batch:
    """The collate function of a loader whose dataset gives finished batches."""
    return data
