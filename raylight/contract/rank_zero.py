"""Functions that run on rank 0 alone. The driver is rank 0 too, until a worker sets its own rank."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_rank = 0


def get_rank() -> int:
    return _rank


def set_rank(rank: int) -> None:
    """Called by a worker once it knows its place, before any user code."""
    global _rank
    _rank = rank
    rank_zero_only.rank = rank  # type: ignore[attr-defined]


def rank_zero_only(function: Function, default: object = None) -> Function:
    """Makes `function` run on rank 0 alone; on the others it returns `default`.

    `rank_zero_only.rank` is this process' rank, as in Lightning.
    """

    @functools.wraps(function)
    def call_on_rank_zero(*args: object, **kwargs: object) -> object:
        # get_rank(), never the variable: a function of the user's __main__ is pickled by value, and so would be the
        # driver's rank.
        return function(*args, **kwargs) if get_rank() == 0 else default

    return call_on_rank_zero  # type: ignore[return-value]


rank_zero_only.rank = _rank  # type: ignore[attr-defined]


@rank_zero_only
def rank_zero_info(message: object, *args: object) -> None:
    """Writes a line to stderr on rank 0; `args` fill the %-placeholders of `message`, as in logging."""
    print(str(message) % args if args else message, file=sys.stderr, flush=True)


@rank_zero_only
def rank_zero_warn(message: object, category: type[Warning] = UserWarning, stacklevel: int = 1, **_: object) -> None:
    """`warnings.warn` on rank 0; with the default `stacklevel` it points at the caller."""
    # Two frames of ours lie between the caller and warn.
    warnings.warn(str(message), category, stacklevel=stacklevel + 2)
