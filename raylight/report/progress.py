"""The progress of a run, from messages of all its ranks: batches, samples a second, time left."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from raylight.contract.messages import EpochMetrics, Message, Progress, StageFinished, StageStarted

RATE_WINDOW_S = 10.0
RATE_STEP_S = 0.2
MAX_UNMARKED_VALUES = 4
"""How many logged values are shown if none was logged with `prog_bar=True`."""


class Rate:
    """Samples a second of all ranks together, over the last seconds that were spent in this stage."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._total = 0
        self._by_rank: dict[int, int] = {}
        self._points: deque[tuple[float, int]] = deque()

    def add(self, rank: int, num_samples: int, now: float) -> None:
        """`num_samples` is that rank's count since its stage began; it falls back when the next epoch begins."""
        before = self._by_rank.get(rank, 0)
        self._by_rank[rank] = num_samples
        self._total += num_samples - before if num_samples >= before else num_samples
        if self._points and now - self._points[-1][0] < RATE_STEP_S:
            return
        self._points.append((now, self._total))
        while now - self._points[0][0] > RATE_WINDOW_S and len(self._points) > 2:
            self._points.popleft()
        (first, at_first), (last, at_last) = self._points[0], self._points[-1]
        if last > first:
            self.value = (at_last - at_first) / (last - first)

    def begin_again(self) -> None:
        """Leaves out the time of other work in between."""
        self._points.clear()


@dataclass(slots=True)
class Stage:
    """One loop over data. Evaluation splits its batches over the ranks, training counts one rank's steps."""

    name: str
    epoch: int
    num_batches: int | None
    began: float
    rate: Rate
    by_rank: dict[int, int] = field(default_factory=dict)

    @property
    def num_done(self) -> int:
        counts = self.by_rank.values()
        return max(counts, default=0) if self.name == "train" else sum(counts)

    @property
    def fraction(self) -> float | None:
        """None if the length of the data is unknown."""
        return min(1.0, self.num_done / self.num_batches) if self.num_batches else None


class RunProgress:
    """The state that bars show. `stages` holds the loops under way, the outer one first."""

    def __init__(self, max_epochs: int | None = None, max_steps: int = -1, max_time_s: float | None = None):
        self.max_epochs = max_epochs if max_epochs is not None and max_epochs > 0 else None
        self.max_steps = max_steps if max_steps > 0 else None
        self.max_time_s = max_time_s
        self.stages: dict[str, Stage] = {}
        self.values: dict[str, float] = {}
        self.step = 0
        self.has_begun = False  # a first batch is through
        self._rates: dict[str, Rate] = {}
        self._began: tuple[float, float, int] | None = None  # time, epochs and steps at the first batch of training

    def handle(self, rank: int, message: Message, now: float) -> None:
        """`now` in seconds, of a clock that only goes forward."""
        if isinstance(message, Progress):
            self._update(rank, message, now)
        elif isinstance(message, StageStarted):
            if rank == 0:
                self._start(message, now)
        elif isinstance(message, StageFinished):
            if rank == 0 and message.stage != "train":  # the next epoch takes the place of this one
                self.stages.pop(message.stage, None)
        elif isinstance(message, EpochMetrics) and not message.logger:
            shown = message.shown or sorted(message.logged)[:MAX_UNMARKED_VALUES]
            self.values |= {name: message.values[name] for name in sorted(shown) if name in message.values}

    def _start(self, message: StageStarted, now: float) -> None:
        for stage in self.stages.values():
            stage.rate.begin_again()
        rate = self._rates.setdefault(message.stage, Rate())
        self.stages[message.stage] = Stage(message.stage, message.epoch, message.num_batches, now, rate)
        self.step = message.step

    def _update(self, rank: int, message: Progress, now: float) -> None:
        stage = self.stages.get(message.stage)
        if stage is None or message.epoch != stage.epoch:
            return  # a rank that is ahead or behind: its next message counts
        stage.by_rank[rank] = message.batch
        stage.rate.add(rank, message.num_samples, now)
        self.has_begun = True
        if rank == 0:
            self.step = message.step
            self.values |= message.values
            if self._began is None and message.stage == "train":
                self._began = (now, self._num_epochs(stage), message.step)

    def time_left_s(self, now: float) -> float | None:
        """Seconds left of the whole fit or evaluation; None while unknown."""
        train = self.stages.get("train")
        if train is not None:
            return self._training_left_s(train, now)
        stage = next(iter(self.stages.values()), None)
        return _extrapolate(now - stage.began, stage.fraction) if stage is not None else None

    def _training_left_s(self, train: Stage, now: float) -> float | None:
        if self._began is None:
            return None
        began, epochs_before, steps_before = self._began
        fractions = []
        if self.max_epochs is not None and self.max_epochs > epochs_before:
            fractions.append((self._num_epochs(train) - epochs_before) / (self.max_epochs - epochs_before))
        if self.max_steps is not None and self.max_steps > steps_before:
            fractions.append((self.step - steps_before) / (self.max_steps - steps_before))
        left = _extrapolate(now - began, max(fractions, default=None))
        if self.max_time_s is None:
            return left
        until_limit = max(0.0, self.max_time_s - (now - began))
        return until_limit if left is None else min(left, until_limit)

    def _num_epochs(self, train: Stage) -> float:
        return train.epoch + (train.fraction or 0.0)


def _extrapolate(elapsed_s: float, fraction: float | None) -> float | None:
    return elapsed_s * (1 - min(fraction, 1.0)) / fraction if fraction else None
