"""The search for the largest batch size that fits, as a pure function of what fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from raylight.contract.errors import InvalidArguments

Mode: TypeAlias = Literal["power", "binsearch"]
Fits = Callable[[int], bool]
"""Tries a batch size."""
Length = Callable[[], int | None]
"""The samples that there are, known once something was tried; None where nobody knows."""
Tell = Callable[[str], None]


def double(fits: Fits, length: Length, first: int, max_trials: int, max_size: int, tell: Tell) -> int:
    """Doubles until a size does not fit, or halves until one does."""
    size, has_grown = first, False
    for trial in range(max_trials):
        if size >= max_size:
            tell(f"batch size {size} is the largest that is tried (max_val={max_size})")
            return size
        if fits(size):
            if trial + 1 == max_trials or _is_whole(size, length, tell):
                return size
            tell(f"batch size {size} fits")
            size, has_grown = min(2 * size, max_size), True
        else:
            tell(f"batch size {size} does not fit")
            size = _halve(size)
            if has_grown:
                return size
    return size


def bisect(
    fits: Fits, length: Length, first: int, max_trials: int, max_size: int, margin: float, tell: Tell
) -> int:  # fmt: skip
    """Doubles until a size does not fit, then halves the distance between the two; at the end `margin`, a share, is
    taken off."""
    size, low, high, num_fitting = first, 1, 0, 0
    while size < max_size:
        if fits(size):
            num_fitting += 1
            low = size
            if num_fitting == max_trials or (high and high - low <= 1) or _is_whole(size, length, tell):
                break
            tell(f"batch size {size} fits")
            size = (high + low) // 2 if high else min(2 * size, max_size)
        else:
            tell(f"batch size {size} does not fit")
            _halve(size)
            high = size
            size = (high + low) // 2
            if high - low <= 1:
                break
    return max(1, int(size * (1 - margin)))


def _halve(size: int) -> int:
    if size < 2:
        raise InvalidArguments("scale_batch_size: even a batch of one sample does not fit into memory")
    return size // 2


def _is_whole(size: int, length: Length, tell: Tell) -> bool:
    there = length()
    if there is None or size < there:
        return False
    tell(f"batch size {size} holds all {there} samples")
    return True
