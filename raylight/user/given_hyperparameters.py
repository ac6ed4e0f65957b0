"""The hyperparameters that the maker of an object knows better than its `__init__`, as a command line's configuration:
there an argument that is an object is still the text that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from raylight.contract.kinds import Value

INSTANTIATOR = "_instantiator"
"""Lightning's key for the function that makes an object of such hyperparameters."""
CLASS_PATH = "_class_path"
"""Lightning's key for the class, beside its arguments."""
CLI_KEYS = (INSTANTIATOR, CLASS_PATH)
"""What LightningCLI keeps among the hyperparameters, for itself."""
_given: ContextVar[tuple[type, dict[str, Value]] | None] = ContextVar("given_hyperparameters", default=None)


@contextmanager
def giving_hyperparameters(kind: type, values: dict[str, Value]) -> Iterator[None]:
    """`save_hyperparameters` of an object of this class keeps these."""
    token = _given.set((kind, values))
    try:
        yield
    finally:
        _given.reset(token)


def find_given_hyperparameters(owner: object) -> dict[str, Value] | None:
    """What was given for `owner`, which is being made; None if nothing was."""
    given = _given.get()
    return dict(given[1]) if given is not None and type(owner) is given[0] else None
