"""Which checkpoint is the best, and which may go: pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raylight.storage.checkpoints import Checkpoint

DEFAULT_MONITOR = "val_loss"


def best(checkpoints: Sequence[Checkpoint], monitor: str | None = None, mode: str = "min") -> Checkpoint | None:
    """The checkpoint with the best `monitor`, the oldest of equals; None if none has a number for it.

    `monitor=None` takes the lowest "val_loss" if the newest checkpoint has one, else the newest checkpoint.
    """
    ordered = rank(checkpoints, monitor, mode)
    return ordered[0] if ordered else None


def rank(checkpoints: Sequence[Checkpoint], monitor: str | None = None, mode: str = "min") -> list[Checkpoint]:
    """The checkpoints that can be compared, best first.

    Of equals the oldest comes first: until the next validation, later checkpoints carry on the value of the last one,
    which was not measured with their weights.
    """
    newest_first = sorted(checkpoints, key=lambda checkpoint: checkpoint.age_key, reverse=True)
    if monitor is None:
        if not newest_first or DEFAULT_MONITOR not in newest_first[0].metrics:
            return newest_first
        monitor, mode = DEFAULT_MONITOR, "min"
    sign = -1.0 if mode == "max" else 1.0
    comparable = [it for it in reversed(newest_first) if not math.isnan(it.metrics.get(monitor, math.nan))]
    return sorted(comparable, key=lambda checkpoint: sign * checkpoint.metrics[monitor])


def rank_measured(checkpoints: Sequence[Checkpoint], monitor: str | None = None, mode: str = "min") -> list[Checkpoint]:
    """`rank` without checkpoints that carry on the value of an older one."""
    found: list[Checkpoint] = []
    measured: set[int] = set()  # at which steps
    for checkpoint in rank(checkpoints, monitor, mode):
        carried_from = checkpoint.manifest.carried.get(monitor or DEFAULT_MONITOR)
        if carried_from is None or carried_from not in measured:
            found.append(checkpoint)
        measured.add(checkpoint.step if carried_from is None else carried_from)
    return found


def retain(
    checkpoints: Sequence[Checkpoint],
    keep_best: int = 1,
    keep_last: int = 1,
    monitor: str | None = None,
    mode: str = "min",
    protected: Collection[str] = (),
) -> list[Checkpoint]:
    """The checkpoints to delete, oldest first.

    Kept are the `keep_best` best and the `keep_last` newest, at least one of each, and those whose name
    ("step-00001200") or path is in `protected`: the one that was resumed from, one that is being read. With -1 for
    either all are kept, also those that cannot be compared.
    """
    if keep_best < 0 or keep_last < 0:
        return []
    newest_first = sorted(checkpoints, key=lambda checkpoint: checkpoint.age_key, reverse=True)
    kept = _first(rank_measured(checkpoints, monitor, mode), keep_best) + _first(newest_first, keep_last)
    names = {checkpoint.name for checkpoint in kept}
    return [
        checkpoint
        for checkpoint in reversed(newest_first)
        if checkpoint.name not in names and checkpoint.name not in protected and checkpoint.path not in protected
    ]


def _first(checkpoints: list[Checkpoint], number: int) -> list[Checkpoint]:
    return checkpoints[: max(1, number)]
