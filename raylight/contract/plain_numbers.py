"""Numbers as Python's own: what a person gives as a number may be a scalar of numpy or torch."""

from __future__ import annotations

from typing import TypeVar

from raylight.contract.kinds import Value

T = TypeVar("T")

_PYTHONS_OWN = (int, float, bool, str, type(None))


def to_python(value: T) -> T:
    """The Python value in a 0-d array or tensor or in a numpy scalar; anything else as it is."""
    if type(value) in _PYTHONS_OWN or isinstance(value, type):
        return value
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()  # type: ignore[attr-defined]
    return value


def with_python_numbers(value: Value) -> Value:
    """As `to_python`, in plain lists, tuples and dicts too."""
    if type(value) in (list, tuple):
        return type(value)(with_python_numbers(item) for item in value)
    if type(value) is dict:
        return {key: with_python_numbers(item) for key, item in value.items()}
    return to_python(value)
