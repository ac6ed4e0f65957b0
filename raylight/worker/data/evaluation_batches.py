"""A user's loader as one rank's part of an evaluation: the batches of one process, dealt to the ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, islice, repeat

import torch

from raylight.contract.errors import DataError
from raylight.contract.kinds import Batch, Index, Indices, Loader
from raylight.user.combined_loader import CombinedLoader, rebuild
from raylight.worker.data.division import Division, Step, deal_evaluation, num_limited, num_samples_in
from raylight.worker.data.fetching import LoaderFetch, find_rows, is_indexed
from raylight.worker.data.readers import StreamSource, check_iterable
from raylight.worker.data.sampling import Sampling, length_of

EvaluationBatch = tuple[int, Batch, int | None]
"""Its index in the whole sequence, the batch, and how many samples it holds; None if only a look into it could tell."""


class EvaluationBatches:
    """One rank's part of the batches that one process would evaluate: batch i goes to rank i % world_size.

    Nothing is padded, so ranks may have different numbers of batches. `num_batches` counts those of all ranks, after
    `limit`; None where the data has no length. Raises DataError where there is nothing to evaluate.
    """

    def __init__(self, loader: Loader, *, rank: int, world_size: int, limit: int | float = 1.0, seed: int = 0):
        self.rank, self.world_size = rank, world_size
        self.source = _open(loader, rank, world_size, seed)
        total = self.source.num_batches
        if total == 0:
            raise DataError(describe_empty(loader, Division(rank, 1, self.source.batch_size)))
        self.num_batches = num_limited(limit, total)

    def iterate(self) -> Iterator[EvaluationBatch]:
        return self.source.read(self.num_batches)

    def find_samples(self, index: int) -> list[Index] | None:
        """The samples of a batch of the whole sequence, as indices into the loader's dataset; None where data has no
        indices."""
        return self.source.find_samples(index)


def _open(loader: Loader, rank: int, world_size: int, seed: int) -> _Evaluation:
    kind: type[_Evaluation] = _IndexedEvaluation if is_indexed(loader) else _StreamEvaluation
    return (_CombinedEvaluation if isinstance(loader, CombinedLoader) else kind)(loader, rank, world_size, seed)


class _Evaluation(ABC):
    batch_size: int
    num_batches: int | None

    @abstractmethod
    def __init__(self, loader: Loader, rank: int, world_size: int, seed: int): ...

    @abstractmethod
    def read(self, num_batches: int | None) -> Iterator[EvaluationBatch]: ...

    @abstractmethod
    def find_samples(self, index: int) -> list[Index] | None: ...


class _IndexedEvaluation(_Evaluation):
    def __init__(self, loader: Loader, rank: int, world_size: int, seed: int):
        self.sampling = Sampling(loader, seed)
        self.are_batches, self.batch_size = self.sampling.are_batches, self.sampling.batch_size
        # A distributed sampler's own drop_last is there for ranks of equal length, which are not needed here.
        self.drop_last = not self.are_batches and loader.drop_last
        division = Division(rank, world_size, self.batch_size)
        self.is_whole = self.sampling.divides_itself
        self.division, self.rank, self.world_size = division.alone() if self.is_whole else division, rank, world_size
        self.rows = find_rows(loader)
        self.slow = LoaderFetch(loader, rank, seed, "evaluate", *((rank,) if self.is_whole else ()))
        own = self._count(self.sampling.length)
        self.num_batches = own * world_size if own is not None and self.is_whole else own

    def _count(self, length: int | None) -> int | None:
        if length is None or self.are_batches:
            return length
        return length // self.batch_size if self.drop_last else math.ceil(length / self.batch_size)

    def read(self, num_batches: int | None) -> Iterator[EvaluationBatch]:
        order = self.sampling.order(0)
        if self.is_whole and num_batches is not None:
            num_batches = math.ceil((num_batches - self.rank) / self.world_size)
        if not hasattr(order, "__len__"):
            fetched = self.slow.fetch(self._deal_unsized(order, num_batches))
        else:
            count = self._count(len(order)) or 0
            count = count if num_batches is None else min(count, num_batches)
            rows = self.rows.place(order) if self.rows is not None else None
            steps = deal_evaluation(order if rows is None else rows, self.division, count, self.are_batches)
            fetched = self.rows.fetch(steps) if self.rows is not None and rows is not None else self.slow.fetch(steps)
        for step, data in fetched:
            index = step.position * self.world_size + self.rank if self.is_whole else step.position
            yield index, data, step.size if self.sampling.knows_sizes else None

    @cached_property
    def _order(self) -> Indices:
        return self.sampling.order(0)

    def find_samples(self, index: int) -> list[Index] | None:
        if not hasattr(self._order, "__len__"):
            return None
        # a sampler of the user's own that divides the data gives each rank an order of its own
        index = index // self.world_size if self.is_whole else index
        first = index * self.batch_size
        units = self._order[index] if self.are_batches else self._order[first : first + self.batch_size]
        if isinstance(units, torch.Tensor):
            return units.tolist()
        return list(units) if isinstance(units, (list, tuple, range)) else [units]

    def _deal_unsized(self, units: Iterable[Index], num_batches: int | None) -> Iterator[Step]:
        unread, index = iter(units), 0
        while num_batches is None or index < num_batches:
            batch = next(unread, None) if self.are_batches else list(islice(unread, self.batch_size))
            if not batch or (self.drop_last and len(batch) < self.batch_size):
                return
            if index % self.division.world_size == self.division.rank:
                yield Step(batch, num_samples_in(batch), 1.0, False, False, index)
            index += 1


class _StreamEvaluation(_Evaluation):
    def __init__(self, loader: Loader, rank: int, world_size: int, seed: int):
        check_iterable(loader)
        self.source = StreamSource(loader, rank, world_size, seed, for_evaluation=True)
        self.rank, self.world_size = rank, world_size
        self.batch_size = self.source.division.micro
        length = self.source.length
        if length is not None:
            length = length // self.batch_size if self.source.stream.drop_last else math.ceil(length / self.batch_size)
            length *= self.source.replicas
        self.num_batches = length

    def find_samples(self, index: int) -> None:
        return None

    def read(self, num_batches: int | None) -> Iterator[EvaluationBatch]:
        if num_batches == self.num_batches:
            num_batches = None  # the data ends it: a length may be wrong
        for arrived, (step, data) in enumerate(self.source.read_evaluation()):
            # A stream that divides itself has no sequence of one process: ranks take turns.
            index = step.position if step.position >= 0 else arrived * self.world_size + self.rank
            if num_batches is not None and index >= num_batches:
                return
            yield index, data, step.size if self.source.knows_sizes else None
            if num_batches is not None and index + self.world_size >= num_batches:
                return


class _CombinedEvaluation(_Evaluation):
    """A CombinedLoader whose batches hold one of each loader: batch i has their i-th batches.

    A loader that begins again is read whole by each rank, since its batches meet others each time.
    """

    batch_size = 1

    def __init__(self, loader: CombinedLoader, rank: int, world_size: int, seed: int):
        self.loaders, self.mode, self.rank, self.world_size = loader.iterables, loader.mode, rank, world_size
        dealt = [_open(leaf, rank, world_size, seed) for leaf in loader.flattened]
        limits = loader.limits if loader.limits is not None else [math.inf] * len(dealt)
        self.counts = [_least(part.num_batches, limit) for part, limit in zip(dealt, limits, strict=True)]
        length = min(self.counts) if self.mode == "min_size" else max(self.counts)
        if math.isinf(length):
            raise DataError(
                f'a loader of a CombinedLoader in the mode "{self.mode}" has no length, and so the evaluation has no '
                "end that all workers agree on; set its `limits`"
            )
        self.num_batches = self.length = int(length)
        self.longest = self.counts.index(length)
        again = self.mode == "max_size_cycle"
        self.parts = [
            _open(leaf, 0, 1, seed) if again and count < length else part
            for leaf, part, count in zip(loader.flattened, dealt, self.counts, strict=True)
        ]

    def read(self, num_batches: int | None) -> Iterator[EvaluationBatch]:
        assert num_batches is not None
        streams = [self._stream(number) for number in range(len(self.parts))]
        for index in range(self.rank, num_batches, self.world_size):
            found = [next(stream, None) for stream in streams]
            counting = found[self.longest]
            if counting is None:
                return
            batches = [None if one is None else one[1] for one in found]
            yield index, rebuild(self.loaders, batches), counting[2]

    def _stream(self, number: int) -> Iterator[EvaluationBatch]:
        """This rank's batches of one loader."""
        part, count = self.parts[number], int(min(self.counts[number], self.length))
        if self.mode != "max_size_cycle" or count == self.length:
            yield from part.read(count)
            return
        for at, batch in enumerate(chain.from_iterable(part.read(count) for _ in repeat(None))):
            if at % self.world_size == self.rank:
                yield batch

    def find_samples(self, index: int) -> None:
        return None


def _least(length: int | None, limit: float) -> float:
    return limit if length is None else min(length, limit)


def describe_empty(loader: Loader, division: Division) -> str:
    dataset = getattr(loader, "dataset", loader)
    length = length_of(dataset)
    name = type(dataset).__name__
    if length:
        return (
            f"the loader over {name} gives no batch: its {length} samples do not fill one step of "
            f"{division.window} (batch size {division.micro}, {division.world_size} workers), and drop_last=True drops "
            "what is left; use drop_last=False, a smaller batch_size, or fewer workers"
        )
    return f"the loader over {name} is empty: its length is 0; check how the data was found and split"
