"""Several training loaders at once: each step takes a batch of every one, until the longest has ended."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.kinds import Batch, Index, Loader
from raylight.worker.data.division import Fetched, num_limited
from raylight.worker.data.readers import IndexedSource, StreamSource, open_source
from raylight.worker.data.source import Source, SourceState, TrackProgress


def is_collection_of_loaders(loader: Loader) -> bool:
    """A dict of loaders, or a list or tuple of them, as opposed to a list of batches, which is a loader itself."""
    if type(loader) not in (list, tuple, dict) or not loader:
        return False
    if isinstance(loader, dict):
        return True
    data = (Tensor, np.ndarray, list, tuple, dict, str, bytes)
    return all(isinstance(m, DataLoader) or (hasattr(m, "__iter__") and not isinstance(m, data)) for m in loader)


class CombinedSource(Source):
    """The longest loader counts the epoch; a shorter one starts again, in a new order, when it has ended.

    A shorter loader's last step is left out where it has no sample for some rank, since a batch must hold something of
    each loader.
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
        self.kind = type(loaders)
        named = loaders if isinstance(loaders, dict) else dict(enumerate(loaders))
        # A seed for each, or loaders of equal length would be shuffled alike.
        self.parts: dict[Hashable, IndexedSource | StreamSource] = {
            name: open_source(loader, rank, world_size, seed + number, whole=whole, overfit=overfit)
            for number, (name, loader) in enumerate(named.items())
        }
        self.num_steps = {name: self._count(name, part, limit) for name, part in self.parts.items()}
        self.longest = max(self.num_steps, key=lambda name: self.num_steps[name])
        counting = self.parts[self.longest]
        super().__init__(counting.division, counting.is_whole)
        self.unit, self.num_units, self.exact_length = counting.unit, counting.num_units, counting.exact_length
        self.knows_sizes = counting.knows_sizes
        self.may_end_apart = any(part.may_end_apart for part in self.parts.values())

    def _count(self, name: Hashable, part: IndexedSource | StreamSource, limit: int | float) -> int:
        if part.num_units is None:
            raise DataError(
                f"training loader {name!r} has no length; of several loaders each must have one, so that it is known "
                "which is the longest"
            )
        num_steps = part.own_division.num_steps(part.num_units)
        if num_steps == 0:
            raise DataError(f"training loader {name!r} gives no batch: it is empty, or drop_last drops all there is")
        return num_limited(limit, num_steps) or 0

    def read(
        self, epoch: int, start: int, num_steps: int | None, cycle: int = 0, track: TrackProgress | None = None
    ) -> Iterator[Fetched]:
        first = self.index_at(start)
        others = {name: self._repeat(name, epoch, first) for name in self.parts if name != self.longest}
        for step, data in self.parts[self.longest].read(epoch, start, num_steps, cycle, track):
            batch = {name: data if name == self.longest else next(others[name]) for name in self.parts}
            if not step.size:
                yield step, None
            else:
                yield step, batch if self.kind is dict else self.kind(batch.values())

    def _repeat(self, name: Hashable, epoch: int, first: int) -> Iterator[Batch]:
        part = self.parts[name]
        assert part.num_units is not None
        usable = min(self.num_steps[name], part.own_division.num_even_steps(part.num_units))
        if usable == 0:
            raise DataError(f"training loader {name!r} has less than one sample for each worker")
        cycle, offset = divmod(first, usable)
        while True:
            start = part.own_division.units_in(offset) * part.replicas
            for _, data in part.read(epoch, start, usable, cycle):
                yield data
            cycle, offset = cycle + 1, 0

    def indices(self, epoch: int, index: int, start: int) -> list[Index] | None:
        return self.parts[self.longest].indices(epoch, index, start)

    def state_at(self, position: int, has_begun: bool) -> SourceState:
        return {}

    def restore(self, state: SourceState, same_world_size: bool) -> None:
        """Positions are enough: the shorter loaders are where the longest has them."""
