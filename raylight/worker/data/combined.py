"""Several training loaders at once: each step takes a batch of every one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.kinds import Batch, Index, Loader
from raylight.user.combined_loader import CombinedLoader, flatten_loaders, rebuild
from raylight.worker.data.division import Fetched
from raylight.worker.data.readers import IndexedSource, StreamSource, mark_last, open_source
from raylight.worker.data.source import Source, SourceState, TrackProgress

_END = object()


@dataclass(slots=True)
class Part:
    """One of the loaders."""

    name: Hashable
    source: IndexedSource | StreamSource
    num_steps: int
    """At most so many in an epoch."""


class CombinedSource(Source):
    """One of the loaders counts the epoch: the longest, or in the mode "min_size" the shortest. A shorter one starts
    again, in a new order, when it has ended; in the mode "max_size" there is nothing of it then.

    A batch must hold something of each loader, on each rank. So a loader that starts again leaves out a last step that
    has no sample for some rank.
    """

    def __init__(
        self,
        loaders: Loader,
        rank: int,
        world_size: int,
        seed: int,
        limit: int | float,
        *,
        global_batch_size: int | None = None,
        whole: bool = False,
        overfit: bool = False,
    ):
        if global_batch_size is not None:
            raise InvalidArguments("global_batch_size needs a single training loader; several were given")
        self.mode = loaders.mode if isinstance(loaders, CombinedLoader) else "max_size_cycle"
        self.loaders = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
        leaves = flatten_loaders(self.loaders)
        names = list(self.loaders) if isinstance(self.loaders, dict) and len(self.loaders) == len(leaves) else None
        # A seed for each, or loaders of equal length would be shuffled alike.
        self.parts = [
            self._open(name, open_source(leaf, rank, world_size, seed + number, whole=whole, overfit=overfit), limit)
            for number, (name, leaf) in enumerate(zip(names or range(len(leaves)), leaves, strict=True))
        ]
        self.counting = self._choose_counting()
        source = self.counting.source
        super().__init__(source.division, source.is_whole)
        self.unit, self.num_units, self.exact_length = source.unit, source.num_units, source.exact_length
        if self.mode == "min_size":
            self._end_before_uneven_steps()
        self.knows_sizes = source.knows_sizes
        self.may_end_apart = any(part.source.may_end_apart for part in self.parts)

    def _open(self, name: Hashable, source: IndexedSource | StreamSource, limit: int | float) -> Part:
        if source.num_units is None:
            if isinstance(limit, int):  # nobody asks for more
                return Part(name, source, limit)
            raise DataError(
                f"training loader {name!r} has no length, so that nobody knows which of several loaders is the longest "
                "or the shortest; say how many batches an epoch has: limit_train_batches=N"
            )
        num_steps = source.own_division.num_steps(source.num_units)
        if num_steps == 0:
            raise DataError(f"training loader {name!r} gives no batch: it is empty, or drop_last drops all there is")
        return Part(name, source, num_steps)

    def _choose_counting(self) -> Part:
        """Of equal ones the first, and rather one that knows its length."""
        sign = -1 if self.mode == "min_size" else 1
        return max(self.parts, key=lambda part: (sign * part.num_steps, part.source.num_units is not None))

    def _end_before_uneven_steps(self) -> None:
        """In the mode "min_size", of the loaders that do not count."""
        sized = [part for part in self.parts if part is not self.counting and part.source.num_units is not None]
        most = min((self._count_even(part) for part in sized), default=self.counting.num_steps)
        if most < self.counting.num_steps:
            self.num_units = self.own_division.units_in(most)
            self.exact_length = None if self.exact_length is None else self.num_units

    def _count_even(self, part: Part) -> int:
        """The steps in which each rank has a sample."""
        assert part.source.num_units is not None
        num_steps = min(part.num_steps, part.source.own_division.num_even_steps(part.source.num_units))
        if num_steps == 0:
            raise DataError(f"training loader {part.name!r} has less than one sample for each worker")
        return num_steps

    def read(
        self, epoch: int, start: int, num_steps: int | None, cycle: int = 0, track: TrackProgress | None = None
    ) -> Iterator[Fetched]:
        fetched = self._read(epoch, start, num_steps, cycle, track)
        is_sure = self.mode != "min_size" or all(part.source.num_units is not None for part in self.parts)
        return fetched if is_sure else mark_last(fetched, None)  # another one may end before the one that counts

    def _read(
        self, epoch: int, start: int, num_steps: int | None, cycle: int, track: TrackProgress | None
    ) -> Iterator[Fetched]:
        first = self.index_at(start)
        if self.num_units is not None:
            most = self.own_division.num_steps(self.num_units)
            num_steps = most if num_steps is None else min(num_steps, most)
        others = {id(part): self._read_beside(part, epoch, first) for part in self.parts if part is not self.counting}
        for step, data in self.counting.source.read(epoch, start, num_steps, cycle, track):
            found = [data if part is self.counting else next(others[id(part)], _END) for part in self.parts]
            if self.mode == "min_size" and any(batch is _END for batch in found):
                return
            batches = (None if batch is _END else batch for batch in found)
            yield step, rebuild(self.loaders, batches) if step.size else None

    def _read_beside(self, part: Part, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of a part that does not count, from step `first` of the epoch on."""
        source, usable = part.source, part.num_steps
        if self.mode == "max_size" and first >= usable:
            return
        if self.mode == "max_size_cycle" and source.num_units is not None:
            usable = self._count_even(part)
        cycle, offset = divmod(first, usable)
        while True:
            start = source.own_division.units_in(offset) * source.replicas
            for _, data in source.read(epoch, start, usable, cycle):
                yield data
            if self.mode != "max_size_cycle":
                return
            cycle, offset = cycle + 1, 0

    def indices(self, epoch: int, index: int, start: int) -> list[Index] | None:
        return self.counting.source.indices(epoch, index, start)

    def state_at(self, position: int, has_begun: bool) -> SourceState:
        return {}

    def restore(self, state: SourceState, same_world_size: bool) -> None:
        """Positions are enough: the other loaders are where the one that counts has them."""
