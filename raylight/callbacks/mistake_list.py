"""The mistakes in the arguments of a callback, as sentences, so that one error lists all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from datetime import timedelta
from typing import TypeGuard

from raylight.contract.durations import read_duration
from raylight.contract.errors import InvalidArguments
from raylight.contract.plain_numbers import to_python


class Mistakes:
    """Collects the mistakes in the arguments of one callback and raises them at once."""

    def __init__(self, owner: str):
        self.owner = owner
        self.found: list[str] = []

    def add(self, text: str) -> None:
        self.found.append(f"{self.owner}: {text}")

    def take(self, texts: Iterable[str]) -> None:
        """Those that another has found, which name their owner."""
        self.found += texts

    def require(self, right: bool, text: str) -> None:
        if not right:
            self.add(text)

    def require_choice(self, name: str, value: object, allowed: Iterable[object]) -> None:
        """`value` must be one of `allowed`; for a misspelt string the sentence names the nearest right one."""
        choices = list(allowed)
        if value in choices:
            return
        near = difflib.get_close_matches(str(value), [c for c in choices if isinstance(c, str)], n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        self.add(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.{hint}")

    def require_count(self, name: str, value: object, least: int) -> None:
        if not is_int(value) or value < least:
            self.add(f"{name}={value!r} must be an int of at least {least}.")

    def require_number(self, name: str, value: object) -> None:
        if not is_number(value):
            self.add(f"{name}={value!r} must be a number.")

    def read_duration(self, name: str, value: object) -> timedelta | None:
        """None if `value` is None, or not a duration."""
        try:
            return None if value is None else read_duration(value)
        except ValueError as error:
            self.add(f"{name}={value!r} {error}.")
            return None

    def refuse_overrides(self, callback: object, names: Iterable[str], advice: str) -> None:
        """Methods of Lightning's that a subclass overrides in vain, as raylight does not call them."""
        found = [name for name in names if hasattr(type(callback), name)]
        self.require(not found, f"{', '.join(found)}: raylight calls no such method; {advice}.")

    def raise_any(self) -> None:
        if self.found:
            raise InvalidArguments(self.found)


def is_int(value: object) -> TypeGuard[int]:
    value = to_python(value)
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    value = to_python(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sort_by_nearness(name: str, names: Iterable[str]) -> list[str]:
    """`names`, those that read most like `name` first."""
    return sorted(names, key=lambda other: (-difflib.SequenceMatcher(None, name, other).ratio(), other))
