"""What a rank has logged in an epoch, folded to little: what ranks reduce at the epoch's end, checkpoints hold, and a
rank that takes over from another goes on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from raylight.contract.kinds import Value

Reduce = str | Callable[[Tensor], Value]
Pairs = list[tuple[float, float]]
"""(value, weight); of what is reduced by its mean, (value times weight, weight). Then a sum has the same digits in
whatever portions it is made."""
Flags = tuple[str, bool, bool, bool, bool]
"""The reduction, "callable" or "metric"; whether logged per step and per epoch, per epoch, on the bar, to loggers."""
Share = dict[str, tuple[Flags, Pairs]]
"""By name."""
NewestValue = tuple[int, str, float, float, bool]
"""One rank's newest step value: the batch of the epoch, how ranks are merged, the value, its weight, whether loggers
get it."""


def make_pairs(reduce: Reduce, values: Sequence[float], weights: Sequence[float]) -> Pairs:
    pairs = zip(values, weights, strict=True)
    return [(value * weight, weight) for value, weight in pairs] if reduce == "mean" else list(pairs)


def fold(reduce: Reduce, pairs: Pairs) -> Pairs:
    """As one pair; a callable needs them all."""
    if len(pairs) < 2 or reduce not in ("mean", "sum", "min", "max"):
        return pairs
    total, weight = pairs[0]
    for value, its_weight in pairs[1:]:
        total += value
        weight += its_weight
    if reduce in ("min", "max"):
        # torch's reductions carry a NaN through, Python's lose it
        total = getattr(torch.tensor([value for value, _ in pairs], dtype=torch.float64), str(reduce))().item()
    return [(total, weight)]


def reduce_pairs(reduce: Reduce, pairs: Pairs) -> float:
    if callable(reduce):
        return float(reduce(torch.tensor([value for value, _ in pairs])))
    ((total, weight),) = fold(reduce, pairs)
    if reduce == "mean":
        return total / weight if weight else float("nan")
    return total


def merge(*shares: Share) -> Share:
    """As if one rank had logged all of it."""
    merged: Share = {}
    for share in shares:
        for name, (flags, pairs) in share.items():
            held = merged[name][1] if name in merged else []
            merged[name] = flags, fold(flags[0], [*held, *pairs])
    return merged


def merge_newest(of_ranks: list[dict[str, NewestValue]]) -> dict[str, float]:
    """The values of the last step that logged each name, over the ranks that had a sample in it."""
    values = {}
    for name in dict.fromkeys(name for its in of_ranks for name in its):
        found = [its[name] for its in of_ranks if name in its]
        last = max(at for at, *_ in found)
        reduce = found[0][1]
        numbers, weights = zip(*((value, weight) for at, _, value, weight, _ in found if at == last), strict=True)
        values[name] = reduce_pairs(reduce, make_pairs(reduce, numbers, weights))
    return values


class PackedValues(TypedDict):
    """One name of a share, as a checkpoint can hold it."""

    flags: list[str | bool]
    pairs: np.ndarray


PackedShare = dict[str, PackedValues]


def pack(share: Share) -> PackedShare:
    """As a checkpoint can hold it."""
    return {name: PackedValues(flags=list(flags), pairs=np.array(pairs)) for name, (flags, pairs) in share.items()}


def unpack(packed: PackedShare) -> Share:
    return {
        name: (cast(Flags, tuple(it["flags"])), [(value, weight) for value, weight in it["pairs"].tolist()])
        for name, it in packed.items()
    }
