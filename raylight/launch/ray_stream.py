"""Stream: the messages of all ranks of a group, as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeAlias

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from raylight.contract.messages import Died, Failure, Message, PeerLost, Progress
from raylight.launch.ray_cluster import is_node_alive
from raylight.launch.ray_roster import describe_death
from raylight.launch.ray_worker import Packed, unpack
from raylight.worker.diagnosis.failure import PERMANENT

WAKE_EVERY_S = 0.2
"""How long a wait lasts at most, so that a signal or a request is seen. A message ends it at once."""
LAST_OUTPUT_S = 2.0
GRACE_AFTER_FAILURE_S = 5.0
"""How long the others may take to leave after an exception of one: the caller waits for its traceback."""
GRACE_AFTER_LOSS_S = 30.0
"""And after the loss of a process: then those that are left are wanted, and may be in a long forward pass."""


Source: TypeAlias = ray.ObjectRefGenerator
"""The messages of one rank, or its output."""


class StreamOwner(Protocol):
    """The group of a stream, as far as the stream acts on it."""

    def perform_requests(self) -> None: ...
    def halt(self, ranks: Iterable[int] | None, reason: str, broken: bool) -> None: ...
    def on_death(self, rank: int) -> str | None: ...  # the id of the node; None if Ray itself is broken
    def on_steady(self) -> None: ...
    def on_end(self, is_whole: bool) -> None: ...
    def kill(self, rank: int) -> None: ...


class Stream(Iterator[tuple[int, Message]]):
    """Messages of all ranks as they come; ends when the last rank has ended, and goes on after `RayGroup.rejoin`.

    Not a generator: an exception that a signal handler raises out of `next` leaves it whole.
    """

    def __init__(self, owner: StreamOwner, steady_after_s: float):
        self._owner, self._steady_after_s = owner, steady_after_s
        self._ranks: dict[Source, int] = {}
        self._output: Source | None = None
        self._ready: deque[tuple[int, Message]] = deque()
        self._broken_at: float | None = None
        self._grace_s = 0.0
        self._explained: dict[int, Died] = {}  # of ranks that were killed from here
        self._training_since: float | None = None
        self._is_over = False

    @property
    def running(self) -> list[int]:
        return sorted(self._ranks.values())

    def begin(self, generators: dict[int, Source], output: Source) -> None:
        """Takes up what the ranks of a new generation say; `output` is what rank 0 prints."""
        self._ranks.update({generator: rank for rank, generator in generators.items()})
        self._output = output
        self._broken_at, self._training_since, self._is_over = None, None, False
        self._explained.clear()

    def report_death(self, rank: int, reason: str) -> None:
        """Of a rank that was found dead before it began, so that none has begun."""
        self._ready.append((rank, Died(reason)))
        self._broken_at, self._is_over = time.monotonic(), False

    def end(self, rank: int, explanation: Died) -> None:
        """Kills the process of a rank that does not leave by itself; `explanation` is what will be said of it."""
        self._explained[rank] = explanation
        self._owner.kill(rank)

    def __next__(self) -> tuple[int, Message]:
        while not self._ready:
            if not self._ranks:
                self._end()
                if not self._ready:
                    raise StopIteration
                break
            self._owner.perform_requests()
            self._collect([*self._ranks, self._output] if self._output is not None else list(self._ranks))
            self._watch_the_clock()
        return self._ready.popleft()

    def drain(self, timeout_s: float) -> None:
        """Lets ranks that were halted end, and drops what they still say."""
        deadline = time.monotonic() + timeout_s
        while self._ranks and time.monotonic() < deadline:
            self._collect(list(self._ranks))
        self._ready.clear()

    def _collect(self, sources: list[Source], timeout_s: float = WAKE_EVERY_S) -> None:
        try:
            ready, waiting = ray.wait(sources, num_returns=1, timeout=timeout_s)
        except SystemError as error:  # what Ray makes of an exception that a signal handler raises meanwhile
            raise error.__cause__ or error from None
        if ready and waiting:
            ready, _ = ray.wait(sources, num_returns=len(sources), timeout=0)
        for source in ready:
            self._take(source)

    def _take(self, source: Source) -> None:
        """One message of a source that has one ready, or its end."""
        rank = self._ranks.get(source)
        try:
            message: Message | Packed = ray.get(next(source))
            if isinstance(message, Packed):
                message = unpack(message)
        except StopIteration:
            self._drop(source)
        except Exception as error:
            self._drop(source)
            if rank is None:
                return
            if isinstance(error, RayError) and not isinstance(error, RayTaskError):
                self._on_death(rank, error)
            else:  # the wrapper around the rank failed, or what it sent cannot be loaded here
                self._on_message(rank, _describe_launch_failure(error))
        else:
            self._on_message(0 if rank is None else rank, message)

    def _drop(self, source: Source) -> None:
        if self._ranks.pop(source, None) is None:
            self._output = None

    def _on_message(self, rank: int, message: Message) -> None:
        self._ready.append((rank, message))
        if isinstance(message, Progress) and message.stage == "train" and self._training_since is None:
            self._training_since = time.monotonic()
        elif isinstance(message, Failure):
            self._on_broken(rank, f"rank {rank} failed: {message.kind}", GRACE_AFTER_FAILURE_S)
        elif isinstance(message, PeerLost):
            self._on_broken(rank, f"rank {rank} lost a peer", GRACE_AFTER_LOSS_S)

    def _on_death(self, rank: int, error: RayError) -> None:
        node_id = self._owner.on_death(rank)
        # Of a process that ends, its node tells at once. One of which nobody tells has lost its node.
        node_lost = node_id is None or isinstance(error, ActorUnavailableError) or not is_node_alive(node_id)
        reason = "its node is gone or cannot be reached" if node_lost else describe_death(error)
        self._ready.append((rank, self._explained.pop(rank, Died(reason, node_lost))))
        self._on_broken(rank, f"rank {rank} died", GRACE_AFTER_LOSS_S)

    def _on_broken(self, rank: int, reason: str, grace_s: float) -> None:
        """The others cannot finish without this rank: they are asked to leave, and given time for it."""
        if self._broken_at is None:
            self._broken_at, self._grace_s, self._training_since = time.monotonic(), grace_s, None
            self._owner.halt([other for other in self.running if other != rank], reason, broken=True)

    def _watch_the_clock(self) -> None:
        now = time.monotonic()
        if self._broken_at is not None and now - self._broken_at > self._grace_s:
            for rank in self.running:
                if rank not in self._explained:
                    self.end(rank, Died(f"it did not stop within {self._grace_s:g} s of another rank's failure"))
        if self._training_since is not None and now - self._training_since > self._steady_after_s:
            self._training_since = None
            self._owner.on_steady()

    def _end(self) -> None:
        if self._is_over:
            return
        deadline = time.monotonic() + LAST_OUTPUT_S
        while self._output is not None and time.monotonic() < deadline:
            self._collect([self._output], timeout_s=LAST_OUTPUT_S)
        self._output, self._is_over = None, True
        self._owner.on_end(is_whole=self._broken_at is None)


def _describe_launch_failure(error: Exception) -> Failure:
    cause = getattr(error, "cause", None) or error
    return Failure(
        kind=type(cause).__name__, text=str(cause), traceback=str(error), step=0, stage="launch", cause=None,
        is_permanent=isinstance(cause, PERMANENT),
    )  # fmt: skip
