"""GoodputClock: the wall time of a run, divided by what it went to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from raylight.contract.messages import Message, Saved, StageStarted

PARTS = ("start_up", "data", "compute", "validation", "checkpoint", "recovery", "lost_work", "closing")


class GoodputClock:
    """The driver's clock, divided by the messages of workers. The parts, in seconds, add up to the wall time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self._part, self._since = "start_up", clock()
        self._seconds = {"start_up": 0.0, "training": 0.0, "recovery": 0.0, "closing": 0.0}
        self._stall_s = self._lost_s = 0.0
        self._safe_at = self._since  # what was done before is on storage

    def follow(self, rank: int, message: Message) -> None:
        if isinstance(message, StageStarted) and message.stage != "sanity":
            self._enter("training")
        elif isinstance(message, Saved) and rank == 0:
            self._stall_s += message.stall_s

    def note_commit(self) -> None:
        self._safe_at = self.clock()

    def note_failure(self, loses_work: bool) -> None:
        """`loses_work`: nobody is left, and what was done since the last checkpoint is done again."""
        if loses_work and self._part == "training":
            self._lost_s += self.clock() - max(self._safe_at, self._since)
        self._enter("recovery")

    def _enter(self, part: str) -> None:
        now = self.clock()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def finish(self) -> None:
        """The workers are done; what follows is the driver's."""
        self._enter("closing")

    def read(self, worker: Mapping[str, float]) -> dict[str, float]:
        """`worker`: what rank 0 measured of its own time, "data" (waiting for batches) and "validation"."""
        self._enter(self._part)
        training = self._seconds["training"]
        inner = {
            "data": worker.get("data", 0.0), "validation": worker.get("validation", 0.0),
            "checkpoint": self._stall_s, "lost_work": self._lost_s,
        }  # fmt: skip
        spent = sum(inner.values())
        if spent > training:  # another process' clock; never more than there was
            inner = {name: seconds * training / spent for name, seconds in inner.items()}
            spent = training
        parts = inner | {"compute": training - spent}
        parts |= {name: self._seconds[name] for name in ("start_up", "recovery", "closing")}
        return {name: parts[name] for name in PARTS}
