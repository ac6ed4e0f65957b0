"""The order of samples in an epoch: a pure function of seed and epoch, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from raylight.contract.kinds import Batch, Index, Indices, Loader, Sampler, StateDict
from raylight.contract.seeding import isolate_rng
from raylight.worker.data.random_stream import RandomStream, derive_seed, seed_process

BLOCK = 1024  # indices read at once from a sampler without length


def length_of(sized: Loader) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def has_distributed_sampler(source: Loader) -> bool:
    """Whether a DataLoader gives each rank its part already."""
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers_of(source))


def samplers_of(source: Loader) -> list[Sampler]:
    """Those of a DataLoader, the outer first."""
    if not isinstance(source, DataLoader):
        return []
    return _layers(source.batch_sampler if source.batch_sampler is not None else source.sampler)


def shuffles(loader: DataLoader[Batch]) -> bool:
    """Whether a sampler may give the samples in another order than the dataset has; one that makes the batches is the
    user's own, and not asked."""
    return type(loader.batch_sampler) is BatchSampler and not isinstance(loader.sampler, SequentialSampler)


def is_stateful(source: Loader) -> bool:
    return all(callable(getattr(source, name, None)) for name in ("state_dict", "load_state_dict"))


class Sampling:
    """What the samplers of a map-style loader say.

    A unit is a sample; where the loader has a batch sampler of the user's own, or makes no batches, it is a batch.
    torch's random, sequential and distributed samplers are read for what they mean; any other one is iterated, on
    every rank alike, with its epoch told and all random numbers that it may draw seeded. With `overfit` every epoch is
    the first one; samples come in the order of the dataset, whatever the sampler says, as in Lightning.
    """

    def __init__(
        self, loader: DataLoader[Batch], seed: int, *, overfit: bool = False, replace_distributed: bool = True
    ):
        self.seed, self.overfit = seed, overfit
        batch_sampler = loader.batch_sampler
        self.are_batches = type(batch_sampler) is not BatchSampler
        self.batch_size = 1 if self.are_batches else batch_sampler.batch_size  # type: ignore[union-attr]
        self.drop_last = False if self.are_batches else batch_sampler.drop_last  # type: ignore[union-attr]
        self.sampler: Sampler = loader.sampler if batch_sampler is None else batch_sampler
        if not self.are_batches:
            self.sampler = batch_sampler.sampler  # type: ignore[union-attr]
        # An index that stands for a whole batch does not say how many samples that holds.
        self.knows_sizes = batch_sampler is not None or isinstance(loader.sampler, BatchSampler)
        self.shuffled: int | None = None  # samples that are put in random order
        self.in_order: int | None = None  # samples that are taken as they come
        self.divides_itself = False  # a distributed sampler of the user's own gives each rank its part already
        if overfit and shuffles(loader):
            self.in_order = length_of(loader.dataset)
        else:
            self._read_known_samplers(replace_distributed)
        known = self.shuffled if self.shuffled is not None else self.in_order
        self.length = known if known is not None else length_of(self.sampler)
        self.is_stateful = is_stateful(self.sampler)
        self.sampler_state: StateDict | None = None  # of a stateful sampler when the epoch began

    def _read_known_samplers(self, replace_distributed: bool) -> None:
        sampler, kind = self.sampler, type(self.sampler)
        shuffled = in_order = None
        if kind is SequentialSampler:
            in_order = len(sampler)
        elif kind is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
            shuffled = len(sampler)
        elif kind is DistributedSampler and replace_distributed:
            self.drop_last = self.drop_last or sampler.drop_last
            shuffled = len(sampler.dataset) if sampler.shuffle else None
            in_order = len(sampler.dataset) if shuffled is None else None
        else:
            self.divides_itself = any(isinstance(layer, DistributedSampler) for layer in _layers(sampler))
        self.shuffled, self.in_order = shuffled, in_order

    def order(self, epoch: int, cycle: int = 0) -> Indices:
        """The units of an epoch: a tensor, range or list; an iterator where the sampler has no length.

        `cycle` counts how often this loader ended within the epoch, beside a longer one.
        """
        epoch = 0 if self.overfit else epoch
        seed = derive_seed(self.seed, epoch, cycle, "order")
        if self.shuffled is not None:
            shuffled = torch.randperm(self.shuffled, generator=torch.Generator().manual_seed(seed))
            return shuffled.tolist() if self.are_batches else shuffled
        if self.in_order is not None:
            return range(self.in_order)
        self._prepare_sampler(epoch)
        if self.length is None:
            return _read_unsized(self.sampler, seed)
        # A sampler whose state counts what it gave gives nothing where that was the whole of the epoch before.
        return self._read_sized(self.length, seed) or self._read_sized(self.length, seed)

    def _read_sized(self, length: int, seed: int) -> list[Index]:
        with isolate_rng(), _seeded_generators(self.sampler, seed):
            seed_process(seed)
            return list(islice(self.sampler, length))

    def _prepare_sampler(self, epoch: int) -> None:
        if self.is_stateful:
            self.sampler_state = self.sampler.state_dict()
        for sampler in _layers(self.sampler):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)


def _layers(sampler: Sampler) -> list[Sampler]:
    inner = getattr(sampler, "sampler", None)
    return [sampler] if inner is None else [sampler, inner]


def _read_unsized(sampler: Sampler, seed: int) -> Iterator[Index]:
    stream, generators = RandomStream(seed), ExitStack()
    with generators:
        generators.enter_context(_seeded_generators(sampler, seed))
        with stream:
            units = iter(sampler)
        while True:
            with stream:
                block = list(islice(units, BLOCK))
            if not block:
                return
            yield from block


@contextmanager
def _seeded_generators(sampler: Sampler, seed: int) -> Iterator[None]:
    """The generators that samplers own, seeded; the user finds them afterwards as they were."""
    generators = [getattr(layer, "generator", None) for layer in _layers(sampler)]
    owned = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
    for generator, _ in owned:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in owned:
            generator.set_state(state)
