"""One user loader as the steps of one rank: by index where it has a sampler, as a stream where it has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.utils.data import DataLoader

from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.kinds import Batch, Index, Indices, Loader
from raylight.user.transfer import pin
from raylight.worker.data.division import (
    Division,
    Fetched,
    Step,
    deal,
    deal_batches,
    deal_unsized,
    divide_batch,
    num_samples_in,
)
from raylight.worker.data.fetching import (
    LoaderFetch,
    copy_loader,
    find_rows,
    is_indexed,
    keeps_torchs_iteration,
    pins_memory,
    with_context,
)
from raylight.worker.data.random_stream import derive_seed
from raylight.worker.data.sampling import Sampling, has_distributed_sampler, length_of
from raylight.worker.data.source import Source, SourceState, StreamState, TrackProgress
from raylight.worker.data.streams import InitWorker, Pass, Stream, give


class IndexedSource(Source):
    """A map-style DataLoader: samples are found by index, so an epoch can be entered anywhere at no cost.

    A `state_dict` of such a loader's own is not asked for: it would skip once more what the position skips already.
    """

    def __init__(
        self,
        loader: DataLoader[Batch],
        rank: int,
        world_size: int,
        seed: int,
        *,
        global_batch_size: int | None = None,
        whole: bool = False,
        overfit: bool = False,
    ):
        self.loader, self.seed, self.rank = loader, seed, rank
        self.sampling = Sampling(loader, seed, overfit=overfit, replace_distributed=not whole)
        self.are_batches, self.drop_last = self.sampling.are_batches, self.sampling.drop_last
        self.unit = "batches" if self.are_batches else "samples"
        self.knows_sizes = self.sampling.knows_sizes
        if self.are_batches and global_batch_size is not None:
            raise InvalidArguments(
                "global_batch_size needs a loader that is given a batch_size; this one has a batch sampler of its own, "
                "or makes no batches"
            )
        self.may_end_apart = whole or self.sampling.divides_itself
        super().__init__(
            make_division(rank, world_size, self.sampling.batch_size, global_batch_size), self.may_end_apart
        )
        length = self.exact_length = self.sampling.length
        self.num_units = self._in_whole_windows(length) if length is not None and self.drop_last else length
        self.rows = find_rows(loader)
        self.slow: LoaderFetch | None = None
        self.known: tuple[tuple[int, int], Indices] | None = None  # the present epoch and its order

    def order(self, epoch: int, cycle: int = 0) -> Indices:
        if self.known is not None and self.known[0] == (epoch, cycle):
            return self.known[1]
        order = self.sampling.order(epoch, cycle)
        self.known = ((epoch, cycle), order) if hasattr(order, "__len__") else None
        return order

    def read(
        self, epoch: int, start: int, num_steps: int | None, cycle: int = 0, track: TrackProgress | None = None
    ) -> Iterator[Fetched]:
        """This rank's steps and batches from position `start` on, at most to step `num_steps` of the epoch."""
        division, order, start = self.own_division, self.order(epoch, cycle), start // self.replicas
        limit = None if num_steps is None else division.units_in(num_steps)
        if not hasattr(order, "__len__"):
            steps = deal_unsized(order, division, start, limit, are_batches=self.are_batches, drop_last=self.drop_last)
            return self._fetch(steps, epoch, cycle)
        end = len(order) if limit is None else min(len(order), limit)
        if self.drop_last:
            end = self._in_whole_windows(end, start)
        if self.are_batches:
            return self._fetch(deal_batches(order, division, start, end), epoch, cycle)
        rows = self.rows.place(order) if self.rows is not None else None
        if self.rows is not None and rows is not None:
            return self.rows.fetch(deal(rows, division, start, end))
        return self._fetch(deal(order, division, start, end), epoch, cycle)

    def _fetch(self, steps: Iterable[Step], epoch: int, cycle: int) -> Iterator[Fetched]:
        if self.slow is None:
            own = (self.rank,) if self.replicas > 1 else ()  # each rank counts positions of its own then
            self.slow = LoaderFetch(self.loader, self.rank, self.seed, "train", *own)
        return self.slow.fetch(steps, epoch, cycle)

    def indices(self, epoch: int, index: int, start: int) -> list[Index] | None:
        """This rank's samples in step `index` of an epoch that was entered at `start`; None where it has no such."""
        division, order, start = self.own_division, self.order(epoch), start // self.replicas
        if not hasattr(order, "__len__"):
            return None
        window, inside = divmod(index - division.index_at(start), division.accumulate)
        begin = start + window * division.window
        dealt = (deal_batches if self.are_batches else deal)(order, division, begin, len(order))
        step = next(islice(dealt, inside, None), None)
        if step is None or num_samples_in(step.units) != step.size:
            return None
        if isinstance(step.units, torch.Tensor):
            return step.units.tolist()
        return list(step.units) if isinstance(step.units, (list, tuple, range)) else [step.units]

    def state_at(self, position: int, has_begun: bool) -> SourceState:
        """Of a sampler with a state: as it was when the epoch began, from where positions are counted."""
        sampling = self.sampling
        if not sampling.is_stateful:
            return {}
        return {"sampler": sampling.sampler_state if has_begun else sampling.sampler.state_dict()}

    def restore(self, state: SourceState, same_world_size: bool) -> None:
        if "sampler" in state and self.sampling.is_stateful:
            self.sampling.sampler.load_state_dict(state["sampler"])
            self.known = None


class StreamSource(Source):
    """An IterableDataset's DataLoader, or any other iterable of batches."""

    def __init__(
        self,
        loader: Loader,
        rank: int,
        world_size: int,
        seed: int,
        *,
        global_batch_size: int | None = None,
        whole: bool = False,
        for_evaluation: bool = False,
    ):
        self.loader, self.seed = loader, seed
        reads_dataset = isinstance(loader, DataLoader) and keeps_torchs_iteration(loader)
        source = loader.dataset if reads_dataset else loader
        if isinstance(source, DataLoader):
            source = with_context(source)
        makes_batches = reads_dataset and loader.batch_sampler is not None
        self.unit = "samples" if makes_batches else "batches"
        if global_batch_size is not None and not makes_batches:
            raise InvalidArguments(
                "global_batch_size needs a DataLoader that is given a batch_size; this loader makes its own batches"
            )
        batch_size = loader.batch_size if makes_batches else 1
        self.knows_sizes = makes_batches
        division = make_division(rank, world_size, batch_size, global_batch_size)
        self.drop_last = makes_batches and loader.drop_last
        self.stream = Stream(
            source,
            division,
            seed,
            collate=loader.collate_fn if reads_dataset else None,
            makes_batches=makes_batches,
            drop_last=self.drop_last,
            is_whole=whole
            or getattr(getattr(loader, "dataset", None), "raylight_sharded", False)
            or has_distributed_sampler(source),
            for_evaluation=for_evaluation,
        )
        super().__init__(division, self.stream.is_whole)
        # A list is the same on all ranks; what code gives may not be.
        self.may_end_apart = self.stream.is_whole or type(source) not in (list, tuple)
        length = self.length = length_of(source)
        self.num_units = self._in_whole_windows(length) if length is not None and self.drop_last else length
        self.pins = reads_dataset and pins_memory(loader)
        self.restored: StreamState | None = None  # state of a stateful source, for the next pass
        self.worker_loader = self._copy_loader() if reads_dataset and loader.num_workers > 0 else None

    def _copy_loader(self) -> DataLoader[Batch]:
        """The user's loader, which gives what its loader workers take from the stream."""
        self.seeds = torch.Generator()
        self.stream.clock.share_memory_()
        self.stream.forget_state()  # it is in other processes, each with batches read ahead
        init = self.loader.worker_init_fn
        replaced = {
            "dataset": self.stream,
            "batch_sampler": None,
            "batch_size": None,
            "drop_last": False,
            "collate_fn": give,
            "worker_init_fn": InitWorker(init) if init is not None else None,
        }
        return copy_loader(self.loader, self.seeds, **replaced)

    def read(
        self, epoch: int, start: int, num_steps: int | None, cycle: int = 0, track: TrackProgress | None = None
    ) -> Iterator[Fetched]:
        """This rank's steps and batches from position `start` on, at most to step `num_steps` of the epoch."""
        if num_steps is not None:
            num_steps = max(num_steps - self.index_at(start), 0)
        if self.worker_loader is not None:
            return mark_last(self._read_in_workers(self.worker_loader, epoch, cycle, start, track), num_steps)
        state, self.restored = self.restored, None
        steps = self.stream.read(Pass(epoch, cycle, start, track=track, state=state))
        # Batches are made after reading ahead: a collate function draws from the process' random numbers, and must do
        # so in the same order whether or not the run was stopped in between.
        return self._make_batches(mark_last(((step, None) for step in steps if step is not None), num_steps))

    def read_evaluation(self) -> Iterator[Fetched]:
        if self.worker_loader is not None:
            return self._read_in_workers(self.worker_loader, 0, 0, 0, None)
        return self._make_batches((step, None) for step in self.stream.read(Pass(0)) if step is not None)

    def _make_batches(self, steps: Iterable[Fetched]) -> Iterator[Fetched]:
        for step, _ in steps:
            data = self.stream.collate_units(step.units) if step.size else None
            yield step, pin(data) if self.pins else data

    def _read_in_workers(
        self, loader: DataLoader[Batch], epoch: int, cycle: int, start: int, track: TrackProgress | None
    ) -> Iterator[Fetched]:
        self.seeds.manual_seed(derive_seed(self.seed, epoch, cycle, self.division.rank, "loader workers"))
        self.stream.clock.copy_(torch.tensor([epoch, cycle, start]))
        if track is not None and start:
            track(0, start)
        for number, fetched in enumerate(loader):
            if track is not None and start and number == 0:
                track(start, start)
            if fetched is not None:
                step, data = fetched
                yield Step(*step), data  # pinning makes another kind of tuple of it

    def indices(self, epoch: int, index: int, start: int) -> list[Index] | None:
        return None

    def state_at(self, position: int, has_begun: bool) -> SourceState:
        if not position:
            return {}
        found = [state for at, state in self.stream.captured if at == position]
        return {"stream": found[0]} if found else {}

    def restore(self, state: SourceState, same_world_size: bool) -> None:
        """A stream that gives each rank its own part has no state that another number of ranks could use."""
        stream = state.get("stream") if self.stream.is_stateful else None
        if stream is not None and not same_world_size and stream["is_whole"]:
            stream = None
        self.restored = stream


def make_division(rank: int, world_size: int, batch_size: int, global_batch_size: int | None) -> Division:
    if global_batch_size is None:
        return Division(rank, world_size, batch_size)
    micro, accumulate = divide_batch(global_batch_size, world_size, batch_size)
    return Division(rank, world_size, micro, accumulate, global_batch_size)


def mark_last(fetched: Iterable[Fetched], num_steps: int | None) -> Iterator[Fetched]:
    """At most `num_steps` of them, each step knowing whether another follows: reads one ahead."""
    unread = iter(fetched) if num_steps is None else islice(fetched, num_steps)
    present = next(unread, None)
    while present is not None:
        following = next(unread, None)
        step, data = present
        yield step._replace(last=following is None), data
        present = following


def open_source(
    loader: Loader,
    rank: int,
    world_size: int,
    seed: int,
    *,
    global_batch_size: int | None = None,
    whole: bool = False,
    overfit: bool = False,
) -> IndexedSource | StreamSource:
    if is_indexed(loader):
        return IndexedSource(
            loader, rank, world_size, seed, global_batch_size=global_batch_size, whole=whole, overfit=overfit
        )
    check_iterable(loader)
    return StreamSource(loader, rank, world_size, seed, global_batch_size=global_batch_size, whole=whole)


def check_iterable(loader: Loader) -> None:
    if not hasattr(loader, "__iter__"):
        raise DataError(
            f"{type(loader).__name__} is no loader: pass a torch DataLoader, or an object that gives batches when it "
            "is iterated"
        )
