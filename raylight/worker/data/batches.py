"""A user's loader as the batches of one rank: exact for any number of workers, and entered again anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from raylight.contract.errors import DataError
from raylight.contract.kinds import Batch, Index, Loader
from raylight.user.combined_loader import CombinedLoader, is_collection_of_loaders
from raylight.user.transfer import batch_size_of, move_to_device
from raylight.worker.data.combined import CombinedSource
from raylight.worker.data.division import Fetched, divide_batch, num_limited
from raylight.worker.data.evaluation_batches import EvaluationBatches, describe_empty
from raylight.worker.data.readers import open_source
from raylight.worker.data.source import Position, Source, TrackProgress

__all__ = [
    "EvaluationBatches",
    "TrainBatch",
    "TrainBatches",
    "batch_size_of",
    "divide_batch",
    "move_to_device",
    "num_limited",
]


class TrainBatch(NamedTuple):
    data: Batch  # None where this rank has no sample in this step
    index: int  # type: ignore[assignment]  # of the step in the epoch
    share: float  # multiply this rank's loss by it: the mean over ranks is then the mean over all samples of the step
    size: int  # samples in `data`
    uneven: bool  # some rank has no sample: no rank may rely on DDP's own reduction in this step
    last: bool  # of the epoch


class TrainBatches:
    """One rank's training batches.

    `loader` is a torch DataLoader, any iterable of batches, or a list, tuple or dict of those (a step then takes a
    batch of each; the shorter ones start again until the longest has ended), or a CombinedLoader of another mode. The
    samples of an epoch and their order are a function of `seed` and epoch alone. Step k of N workers with batch B holds
    samples k*N*B to (k+1)*N*B of that order, a slice for each rank; nothing is padded and nothing repeated; `drop_last`
    drops an incomplete step of all workers. With `global_batch_size` an optimizer step takes that many samples with any
    number of workers, in `accumulate` steps. With `use_distributed_sampler=False` every rank goes through the whole
    loader.

    Raises DataError where there is nothing to train on, InvalidArguments where arguments contradict the loader.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        rank: int,
        world_size: int,
        seed: int,
        limit: int | float = 1.0,
        use_distributed_sampler: bool = True,
        global_batch_size: int | None = None,
        overfit: bool = False,
    ):
        self.world_size = world_size
        self.source: Source
        whole = not use_distributed_sampler
        if isinstance(loader, CombinedLoader) or is_collection_of_loaders(loader):
            self.source = CombinedSource(
                loader, rank, world_size, seed, limit, global_batch_size=global_batch_size, whole=whole, overfit=overfit
            )
        else:
            self.source = open_source(
                loader, rank, world_size, seed, global_batch_size=global_batch_size, whole=whole, overfit=overfit
            )
        self.loader = loader
        self.knows_sizes = self.source.knows_sizes  # else `TrainBatch.size` is a guess
        self.accumulate = self.source.division.accumulate
        num_units = self.source.num_units
        total = None if num_units is None else self.source.own_division.num_steps(num_units)
        if total == 0:
            raise DataError(describe_empty(loader, self.source.own_division))
        self.num_batches = num_limited(limit, total)
        # The data ends an epoch where no limit does: entered in the middle it may have a step more or less.
        self._limit = None if self.num_batches == total else self.num_batches
        self.position = 0
        self._epoch, self._start = -1, 0  # of the newest `iterate`
        self._entered = False  # a batch has been given since `_start` was set

    def iterate(
        self,
        epoch: int,
        start: int = 0,
        *,
        agree: Callable[[bool], bool] | None = None,
        progress: TrackProgress | None = None,
    ) -> Iterator[TrainBatch]:
        """The batches of an epoch from position `start` on, which is 0 or comes from `position_after` or `position`.

        `agree(flag)` says whether the flag is true on every rank; it is called one batch ahead, on data of which ranks
        may have different amounts, and all of them then end with the first that ends. `progress(done, total)` is called
        while a stream that cannot be entered in the middle is read up to `start`.
        """
        if start != self.position:
            self.source.restore({}, True)
        self._epoch, self._start, self._entered, self.position = epoch, start, False, 0
        fetched = self.source.read(epoch, start, self._limit, track=progress)
        if agree is not None and self.world_size > 1 and self.source.may_end_apart:
            fetched = _end_together(fetched, agree)
        return self._number(fetched, start)

    def _number(self, fetched: Iterator[Fetched], start: int) -> Iterator[TrainBatch]:
        first = index = self.source.index_at(start)
        for (_, size, share, uneven, last, _), data in fetched:
            self._entered = True
            yield TrainBatch(data, index, share, size, uneven, last)
            index += 1
        if index == first and start == 0 and self.num_batches != 0:
            raise DataError(_describe_nothing(self.loader, self._epoch))

    def position_after(self, index: int) -> int:
        """How much of the epoch all ranks together have consumed when step `index` is done.

        In samples; in batches where only batches are known. Before the first batch of a resumed epoch it is where that
        epoch was entered, whatever the index, which another number of workers may have counted.
        """
        if self._start and not self._entered:
            return self._start
        return self.source.position_after(self._start, index)

    @property
    def first_index(self) -> int:
        """The index of the first batch that `iterate(epoch, position)` gives; at the epoch's end the number of all."""
        length = self.source.exact_length
        if length is not None and self.num_batches is not None and self.position >= length * self.source.replicas:
            return self.num_batches  # a last step that was not full has no index of its own to begin at
        return self.source.index_at(self.position)

    def state_dict(self, epoch: int, index: int | None = None) -> Position:
        """Where `epoch` stands when step `index` is done; None: at its beginning, which may lie before `iterate`."""
        position = 0 if index is None else self.position_after(index)
        state = self.source.state_at(position, epoch == self._epoch)
        return {"position": position, "unit": self.source.unit, "world_size": self.world_size, **state}

    def load_state_dict(self, state: Position) -> None:
        """Puts back what `state_dict` of any number of workers returned: go on with `iterate(epoch, position)`."""
        if state["position"] and state["unit"] != self.source.unit:
            raise DataError(
                f"the checkpoint was made in the middle of an epoch whose {state['unit']} were counted, but the "
                f"present training loader gives {self.source.unit}; resume with the loader of that run, or from a "
                "checkpoint made at the end of an epoch"
            )
        self.position = self._start = state["position"]
        self._entered = False
        self.source.restore(state, state["world_size"] == self.world_size)

    def indices(self, epoch: int, index: int) -> list[Index] | None:
        """This rank's samples in step `index`, as indices into the loader's dataset; None where data has no indices."""
        return self.source.indices(epoch, index, self._start if epoch == self._epoch else 0)


def _end_together(fetched: Iterator[Fetched], agree: Callable[[bool], bool]) -> Iterator[Fetched]:
    present = next(fetched, None)
    if not agree(present is not None):
        return
    while present is not None:
        step, data = present
        last = not agree(not step.last)
        yield step._replace(last=last), data
        present = None if last else next(fetched, None)


def _describe_nothing(loader: Loader, epoch: int) -> str:
    text = f"the training loader ({type(loader).__name__}) gave no batch in epoch {epoch}"
    if isinstance(loader, Iterator):
        return f"{text}: an iterator can be read once; pass an object that begins anew each time it is iterated"
    return (
        f"{text} on this rank or on another; a dataset that divides itself needs at least one batch for each worker "
        "and each of its loader workers"
    )
