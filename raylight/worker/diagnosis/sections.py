"""Sections of a profiler around the pieces of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar

from raylight.worker.diagnosis.profiler import Profiler

P = ParamSpec("P")
R = TypeVar("R")


class Sections:
    """Wraps functions so that a profiler sees each call; without a profiler nothing is wrapped."""

    def __init__(self, profiler: Profiler):
        self.profiler = profiler

    def around(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """The function, with a section of this name around each call."""

        def run(*arguments: P.args, **keywords: P.kwargs) -> R:
            with self.profiler.section(name):
                return function(*arguments, **keywords)

        return run

    def around_items(self, name: str, items: Iterable[R]) -> Iterator[R]:
        """The items, with a section around fetching each. When the next is asked for, a step is over."""
        unread = iter(items)
        while True:
            with self.profiler.section(name):
                try:
                    item = next(unread)
                except StopIteration:
                    return
            yield item
            self.profiler.step()
