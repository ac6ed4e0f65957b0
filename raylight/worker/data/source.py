"""Source: a user's loader, or several, as the steps of one rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NotRequired, TypedDict

from raylight.contract.kinds import Index, StateDict
from raylight.contract.seeding import RNGState
from raylight.worker.data.division import Division, Fetched

TrackProgress = Callable[[int, int], None]
"""Called with the items passed over and the items to pass over."""


class StreamState(TypedDict):
    """A stateful stream, as it was at a position."""

    source: StateDict
    is_whole: bool
    random: NotRequired[RNGState]


class SourceState(TypedDict, total=False):
    """What a position alone does not say; empty for most loaders."""

    sampler: StateDict | None
    stream: StreamState


class Position(SourceState):
    """Where an epoch of training stands, for any number of workers."""

    position: int
    unit: str
    world_size: int


class Source(ABC):
    """What all kinds have: positions count units of all ranks, `own_division` those that this rank goes through."""

    unit: str
    """"samples" or "batches"."""
    num_units: int | None = None
    """Of an epoch, after drop_last."""
    exact_length: int | None = None
    """Of an epoch, if it cannot be wrong."""
    may_end_apart = False
    """Ranks may come to the end at different steps."""
    knows_sizes = True
    """How many samples a batch holds is known, not guessed from what is in it."""

    def __init__(self, division: Division, is_whole: bool):
        self.division, self.is_whole = division, is_whole
        self.own_division = division.alone() if is_whole else division
        self.replicas = division.world_size if is_whole else 1

    @abstractmethod
    def read(
        self, epoch: int, start: int, num_steps: int | None, cycle: int = 0, track: TrackProgress | None = None
    ) -> Iterator[Fetched]:
        """This rank's steps and batches from position `start` on, at most to step `num_steps` of the epoch."""

    @abstractmethod
    def indices(self, epoch: int, index: int, start: int) -> list[Index] | None:
        """This rank's samples in step `index` of an epoch that was entered at `start`; None if it has no such."""

    @abstractmethod
    def state_at(self, position: int, has_begun: bool) -> SourceState:
        """What is needed beside `position`; `has_begun`: the present epoch has been entered."""

    @abstractmethod
    def restore(self, state: SourceState, same_world_size: bool) -> None:
        """Puts back what `state_at` returned."""

    def index_at(self, position: int) -> int:
        return self.own_division.index_at(position // self.replicas)

    def position_after(self, start: int, index: int) -> int:
        position = self.own_division.position_after(start // self.replicas, index)
        if self.exact_length is not None:
            position = min(position, self.exact_length)
        return position * self.replicas

    def _in_whole_windows(self, total: int, start: int = 0) -> int:
        return total - (total - start) % self.own_division.window
