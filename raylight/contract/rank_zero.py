"""Functions that run on rank 0 alone. The driver is rank 0 too, until a worker sets its own rank."""

from __future__ import annotations

import functools
import logging
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


@rank_zero_only
def rank_zero_debug(message: object, *args: object) -> None:
    """A record of logging's level DEBUG on rank 0, by the logger "raylight"."""
    logging.getLogger("raylight").debug(message, *args, stacklevel=3)


@rank_zero_only
def rank_zero_deprecation(message: object, stacklevel: int = 1, **_: object) -> None:
    """`rank_zero_warn` with the category LightningDeprecationWarning."""
    warnings.warn(str(message), LightningDeprecationWarning, stacklevel=stacklevel + 2)


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """The message with the rank in front of it, if there is one."""
    return message if rank is None else f"[rank: {rank}] {message}"


class LightningDeprecationWarning(DeprecationWarning):
    """A name that will go."""


class PossibleUserWarning(UserWarning):
    """A warning of what may be a mistake."""


def disable_possible_user_warnings(module: str = "") -> None:
    """Shows no PossibleUserWarning, or none from modules whose names begin with `module`."""
    warnings.filterwarnings("ignore", category=PossibleUserWarning, module=module)


class WarningCache(set[str]):
    """Gives each message once."""

    def warn(self, message: str, stacklevel: int = 1, **options: Any) -> None:
        """`rank_zero_warn` if the message is new."""
        if message not in self:
            self.add(message)
            rank_zero_warn(message, stacklevel=stacklevel + 1, **options)

    def deprecation(self, message: str, stacklevel: int = 1) -> None:
        """`rank_zero_deprecation` if the message is new."""
        if message not in self:
            self.add(message)
            rank_zero_deprecation(message, stacklevel=stacklevel + 1)

    def info(self, message: str) -> None:
        """`rank_zero_info` if the message is new."""
        if message not in self:
            self.add(message)
            rank_zero_info(message)
