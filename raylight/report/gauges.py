"""A run in a few numbers for Prometheus, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from raylight.contract.messages import Died, Failure, Finished, Message, PeerLost, Progress, Saved, StageStarted
from raylight.report.progress import Rate

GAUGES = {
    "raylight_step": "Optimizer steps that the run has made.",
    "raylight_samples_per_s": "Samples a second in training, of all workers together.",
    "raylight_loss": "The training loss that was logged last.",
    "raylight_data_wait_ratio": "Share of its time in which the worker that waits most waits for batches.",
    "raylight_checkpoint_stall_s": "Seconds for which the last checkpoint held training up.",
    "raylight_world_size": "Workers of the run.",
    "raylight_restarts": "How often the group of workers was formed again.",
}
"""Name -> description. cluster/grafana.json shows them."""

PUBLISH_EVERY_S = 1.0
WAIT_WINDOW_S = 10.0
_EVALUATION = ("val", "test", "sanity", "predict")


class RunNumbers(Protocol):
    """A run, as far as its gauges read it."""

    @property
    def step(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def num_restarts(self) -> int: ...
    @property
    def logged_metrics(self) -> Mapping[str, float]: ...


class Gauges:
    """A sink that publishes the numbers while messages come; its cost is negligible, even with a thousand ranks."""

    def __init__(
        self, run: RunNumbers, publish: Callable[[dict[str, float]], None], clock: Callable[[], float] = time.monotonic
    ):
        self._run, self._publish, self._clock = run, publish, clock
        self._rate = Rate()
        self._waits: dict[int, WaitRatio] = {}
        self._stall: tuple[str, float] | None = None  # the newest checkpoint, and the longest stall of a rank for it
        self._publish_at = clock()

    def handle(self, rank: int, message: Message) -> None:
        now = self._clock()
        if isinstance(message, Progress):
            if message.stage == "train":
                self._rate.add(rank, message.num_samples, now)
                self._waits.setdefault(rank, WaitRatio()).add(message.data_wait_s, now)
        elif isinstance(message, StageStarted) and rank == 0:
            self._rate.begin_again()
        elif isinstance(message, Saved):
            self._note_stall(message)
        elif isinstance(message, Failure | PeerLost | Died):
            self._rate = Rate()
            self._waits.clear()
        if now >= self._publish_at or (isinstance(message, Finished) and rank == 0):
            self._publish_at = now + PUBLISH_EVERY_S
            self._publish(self.read())

    def read(self) -> dict[str, float]:
        """The newest values by name, without unknown ones."""
        run = self._run
        waits = [wait.value for wait in self._waits.values() if wait.value is not None]
        known = {
            "step": float(run.step),
            "samples_per_s": self._rate.value or 0.0,
            "loss": find_loss(run.logged_metrics),
            "data_wait_ratio": max(waits, default=None),
            "checkpoint_stall_s": self._stall[1] if self._stall is not None else None,
            "world_size": float(run.world_size),
            "restarts": float(run.num_restarts),
        }
        return {f"raylight_{name}": value for name, value in known.items() if value is not None}

    def _note_stall(self, message: Saved) -> None:
        before = self._stall
        is_same = before is not None and before[0] == message.directory
        self._stall = message.directory, max(message.stall_s, before[1] if before is not None and is_same else 0.0)


class WaitRatio:
    """Share of a rank's last seconds spent waiting for batches."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._since: tuple[float, float] | None = None  # time, and seconds waited until then

    def add(self, waited_s: float, now: float) -> None:
        """`waited_s` counts from when the rank began to train; it falls back when the rank begins again."""
        if self._since is None or waited_s < self._since[1]:
            self._since = now, waited_s
            return
        began, before = self._since
        if now - began >= PUBLISH_EVERY_S:
            self.value = min(1.0, (waited_s - before) / (now - began))
        if now - began >= WAIT_WINDOW_S:
            self._since = now, waited_s


def find_loss(values: Mapping[str, float]) -> float | None:
    """The training loss, recognised by its name; of several, the one with the shortest name."""
    names = [name for name in values if "loss" in name.lower() and not name.lower().startswith(_EVALUATION)]
    return values[min(names, key=lambda name: (len(name), name))] if names else None
