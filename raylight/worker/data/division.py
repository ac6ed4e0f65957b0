"""How the samples of an epoch fall to workers and steps: pure arithmetic, the same on every rank.

An epoch is one sequence of samples that knows nothing of workers. It is cut into windows, one for each optimizer
step; a window into steps, one for each time all ranks compute gradients; a step into one slice for each rank. So N
workers with batch B do what one process does with batch N * B, and a sequence that was read up to some position can be
read on from there by any other number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.kinds import Batch, Index, Indices


@dataclass(frozen=True, slots=True)
class Division:
    """Numbers are in units: samples, or whole batches where the user's loader makes the batches."""

    rank: int
    world_size: int
    micro: int
    """Units that a rank takes in one step."""
    accumulate: int = 1
    """Steps in a window; more than 1 only where `global_batch_size` asks for it."""
    window: int = 0
    """Units of all ranks in one optimizer step; 0: as many as the steps of one window can take."""

    def __post_init__(self) -> None:
        if not self.window:
            object.__setattr__(self, "window", self.step * self.accumulate)

    @property
    def step(self) -> int:
        """Units of all ranks in one full step."""
        return self.micro * self.world_size

    def alone(self) -> Division:
        """The division of a rank whose data is its own already."""
        return Division(0, 1, self.micro, self.accumulate, math.ceil(self.window / self.world_size))

    def num_steps(self, total: int) -> int:
        windows, rest = divmod(total, self.window)
        return windows * self.accumulate + math.ceil(rest / self.step)

    def num_even_steps(self, total: int) -> int:
        """Steps in which every rank has something."""
        rest = total % self.window % self.step
        return self.num_steps(total) - (0 < rest < self.world_size)

    def units_in(self, num_steps: int) -> int:
        """Units that the first `num_steps` steps of an endless epoch consume."""
        windows, rest = divmod(num_steps, self.accumulate)
        return windows * self.window + min(rest * self.step, self.window)

    def index_at(self, position: int) -> int:
        """The index of the step that begins at `position`; rounded down where another division led there."""
        return position // self.window * self.accumulate

    def position_after(self, start: int, index: int) -> int:
        """Where the epoch stands when step `index` is done, in an epoch that was entered at `start`."""
        return start + self.units_in(index + 1 - self.index_at(start))


class Step(NamedTuple):
    """What one rank does in one step."""

    units: Indices  # this rank's part: indices of samples, one batch of indices, or data; empty where it has none
    size: int  # samples in it
    share: float  # factor on this rank's loss that makes the mean over ranks the mean over all samples
    uneven: bool  # some rank has nothing
    last: bool  # of the epoch
    position: int  # of this rank's first unit in the epoch


Fetched = tuple[Step, Batch]
"""A step, and the data of this rank's part in it; None if it is empty."""


def divide_batch(global_batch_size: int, world_size: int, batch_size: int) -> tuple[int, int]:
    """Samples a rank takes at once, at most `batch_size`, and how often before the optimizer steps."""
    if global_batch_size < world_size:
        raise InvalidArguments(
            f"global_batch_size={global_batch_size} is less than one sample for each of {world_size} workers; "
            f"give at least {world_size}, or use fewer workers"
        )
    per_rank = math.ceil(global_batch_size / world_size)
    accumulate = math.ceil(per_rank / batch_size)
    return math.ceil(per_rank / accumulate), accumulate


def num_limited(limit: int | float, total: int | None) -> int | None:
    """Batches that a `limit_*_batches` leaves of `total`: an int counts them, a float is a fraction of them.

    None stands for an unknown number. Raises InvalidArguments for a limit that has no meaning and DataError where a
    fraction would leave less than one batch, or is one of an unknown number.
    """
    if isinstance(limit, int) and not isinstance(limit, bool):
        if limit < 0:
            raise InvalidArguments(f"a limit of {limit} batches is negative; 0 leaves none, 1.0 all of them")
        return limit if total is None else min(limit, total)
    if not 0.0 <= limit <= 1.0:
        raise InvalidArguments(f"a limit of {limit!r} is no fraction from 0.0 to 1.0; an int is a number of batches")
    if limit == 1.0 or total == 0:
        return total
    if limit == 0.0:
        return 0
    if total is None:
        raise DataError(
            f"a limit of {limit} is a fraction of data whose length is unknown; give a number of batches (an int), or "
            "give the dataset a __len__"
        )
    count = int(limit * total)
    if count == 0:
        raise DataError(
            f"a limit of {limit} leaves less than one of {total} batches; give at least {1 / total:.3g}, or a number "
            "of batches (an int)"
        )
    return count


def deal(order: Indices, division: Division, start: int, end: int) -> Iterator[Step]:
    """This rank's slices of `order[start:end]`, where a unit is a sample.

    The last step of an uneven epoch is cut into slices that differ by one sample at most.
    """
    rank, world_size, step, window = division.rank, division.world_size, division.step, division.window
    factor = world_size * division.accumulate
    if window == step:  # full steps, which are all but the last, need none of the arithmetic below
        micro, offset, full_end = division.micro, rank * division.micro, end - (end - start) % step
        for units in _cut(order, start, full_end, step, offset, micro):
            start += step
            yield Step(units, micro, 1.0, False, start == end, start - step + offset)
    for window_start in range(start, end, window):
        window_end = min(window_start + window, end)
        num_samples = window_end - window_start
        for low in range(window_start, window_end, step):
            high = min(low + step, window_end)
            count = high - low
            begin, stop = low + count * rank // world_size, low + count * (rank + 1) // world_size
            share = (stop - begin) * factor / num_samples
            yield Step(order[begin:stop], stop - begin, share, count < world_size, high == end, begin)


def _cut(order: Indices, start: int, end: int, step: int, offset: int, micro: int) -> Iterator[Index]:
    """`micro` units at `offset` of each full step."""
    if not isinstance(order, Tensor):
        yield from (order[low : low + micro] for low in range(start + offset, end, step))
        return
    block = step * 1024  # cut in one call, which takes a third of the time of slicing one by one
    for low in range(start, end, block):
        yield from order[low : min(low + block, end)].view(-1, step)[:, offset : offset + micro].unbind()


def deal_batches(batches: Sequence[Index], division: Division, start: int, end: int) -> Iterator[Step]:
    """This rank's every `world_size`-th of `batches[start:end]`, where a unit is a batch of indices."""
    rank, world_size = division.rank, division.world_size
    for low in range(start, end, world_size):
        group = batches[low : min(low + world_size, end)]
        sizes = [num_samples_in(unit) for unit in group]
        mine, size = (group[rank], sizes[rank]) if rank < len(group) else ([], 0)
        uneven = len(group) < world_size
        yield Step(mine, size, size * world_size / sum(sizes), uneven, low + world_size >= end, low + rank)


def deal_unsized(
    units: Iterable[Index], division: Division, start: int, end: int | None, *, are_batches: bool, drop_last: bool
) -> Iterator[Step]:
    """The same from a sampler that does not say how long it is, reading one window ahead to know the last step."""
    unread = islice(units, start, end)
    position, window = start, list(islice(unread, division.window))
    while window and not (drop_last and len(window) < division.window):
        following = list(islice(unread, division.window))
        ends = not following or (drop_last and len(following) < division.window)
        for step in (deal_batches if are_batches else deal)(window, division, 0, len(window)):
            yield step._replace(position=position + step.position, last=step.last and ends)
        position, window = position + len(window), following


def deal_evaluation(order: Indices, division: Division, num_batches: int, are_batches: bool) -> Iterator[Step]:
    """This rank's every `world_size`-th batch of the sequence that one process would evaluate."""
    size = division.micro
    for index in range(division.rank, num_batches, division.world_size):
        units = order[index] if are_batches else order[index * size : (index + 1) * size]
        yield Step(units, num_samples_in(units), 1.0, False, index + division.world_size >= num_batches, index)


def num_samples_in(unit: Index) -> int:
    """Samples behind what a sampler gave: a list of indices, or one index that stands for a whole batch."""
    return len(unit) if hasattr(unit, "__len__") and not isinstance(unit, (str, bytes)) else 1
