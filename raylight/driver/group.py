"""Group: the workers of a run as the driver knows them, wherever they live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

from raylight.contract.messages import Message
from raylight.contract.requests import Request
from raylight.contract.task import Task

Messages = Iterator[tuple[int, Message]]
"""A rank, and what it says."""
SignOfLife = tuple[str, int, float]
"""Stage, step, and seconds since."""


class Group(ABC):
    """Workers 0 to world_size - 1, over all generations of one run and from one run to the next."""

    can_recover = False
    """Whether those that are left outlive one that is lost."""
    is_local = False
    """Whether the workers are in this process, and use the caller's own objects."""
    watch: Callable[[], None] | None = None
    """Called a few times a second while messages are waited for."""

    @property
    @abstractmethod
    def world_size(self) -> int: ...

    @abstractmethod
    def run(self, task: Task) -> Messages:
        """Begins a task on all ranks."""

    @abstractmethod
    def rejoin(self, task: Task) -> Messages:
        """Begins the next generation, once all ranks of a broken one have ended."""

    @abstractmethod
    def request(self, request: Request) -> None:
        """All ranks do it at one step boundary. Safe in a signal handler."""

    @abstractmethod
    def pause(self) -> None:
        """Each rank gives a `Paused` at one step boundary, once what it had begun to write is on storage."""

    @abstractmethod
    def resume(self) -> None:
        """Ends a pause."""

    @abstractmethod
    def halt(self) -> None:
        """Makes all ranks leave at once."""

    @abstractmethod
    def wait(self) -> None:
        """Returns once all ranks have left that were halted."""

    def follow(self, watch: Callable[[], None] | None) -> None:
        """Calls `watch` while messages are waited for."""
        self.watch = watch

    # ---- failures; a group that cannot recover has none of these

    @property
    def exception(self) -> BaseException | None:
        """The exception that ended a rank in this process, with its real traceback."""
        return None

    def ages(self) -> dict[int, SignOfLife | None]:
        """The last sign of life of each running rank; None: it does not answer."""
        return {}

    def stacks(self) -> dict[int, str]:
        """The Python stacks of each running rank."""
        return {}

    def end_hung(self, rank: int, reason: str, step: int, stacks: str) -> None:
        """Kills the process of a rank that hangs; its `Died` says why."""
        raise NotImplementedError

    def replace(self, rank: int, timeout_s: float = 60.0) -> object | None:
        """Gives a rank another process; None if there is no room within `timeout_s`."""
        raise NotImplementedError

    def drop(self, ranks: Iterable[int]) -> None:
        """Goes on without these ranks from the next generation; the others move up."""
        raise NotImplementedError

    def recruit_up_to(self, count: int) -> None:
        """Asks for more ranks until they would be `count`."""
        raise NotImplementedError

    @property
    def num_recruits(self) -> int:
        """Additional workers that wait to be adopted."""
        return 0

    def adopt(self, most: int) -> int:
        """Makes those that wait the last ranks, until there are `most`; returns how many."""
        return 0

    def draining(self) -> list[int]:
        """Ranks on nodes that will be taken away soon."""
        return []
