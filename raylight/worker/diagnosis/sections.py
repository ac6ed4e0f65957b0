"""Sections of a profiler around the pieces of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from raylight.user.profilers import Profiler, SimpleProfiler
from raylight.worker.group.collectives import gather_objects

if TYPE_CHECKING:
    from raylight.worker.worker import Worker

P = ParamSpec("P")
R = TypeVar("R")


class Sections:
    """Wraps functions so that a profiler sees each call; without a profiler nothing is wrapped."""

    def __init__(self, profiler: Profiler):
        self.profiler = profiler

    def around(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """The function, with a section of this name around each call."""

        def run(*arguments: P.args, **keywords: P.kwargs) -> R:
            with self.profiler.profile(name):
                return function(*arguments, **keywords)

        return run

    def around_items(self, name: str, items: Iterable[R], steps: bool = True) -> Iterator[R]:
        """The items, with a section around fetching each. With `steps` each is a step, which is over when the next one
        is asked for, or nothing more is."""
        unread = iter(items)
        while True:
            with self.profiler.profile(name):
                try:
                    item = next(unread)
                except StopIteration:
                    return
            try:
                yield item
            finally:  # the last step of a run is no other's start
                if steps and hasattr(self.profiler, "step"):  # Lightning's have none
                    self.profiler.step()


def begin_profile(worker: Worker) -> None:
    """A run begins on this rank."""
    profiler, files = worker.profiler, worker.task.files
    if worker.config.profiler is None:
        return
    rank = worker.rank if worker.world_size > 1 else None
    profiler.setup(worker.task.stage, rank, files.local_path("") if files is not None else None)
    if hasattr(profiler, "watch"):
        profiler.watch(worker.module)


def end_profile(worker: Worker) -> None:
    """Tells the person what was measured: of the simple profiler one table for all ranks, else of each rank its own.
    Call it on every rank."""
    profiler, several = worker.profiler, worker.world_size > 1
    if worker.config.profiler is None:
        return
    profiler.teardown(worker.task.stage)
    if isinstance(profiler, SimpleProfiler) and several and not profiler.filename:
        ranks = gather_objects(profiler.measured, worker.world_size)
        text = profiler.summarize(ranks) if worker.is_first else ""
    else:
        described = profiler.describe()
        text = profiler.summary() if described is None else described  # Lightning's returns nothing
        text = f"rank {worker.rank}:\n{text}" if several and text else text
    if text:
        worker.outbox.notice(text)
