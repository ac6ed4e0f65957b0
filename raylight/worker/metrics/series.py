"""What was logged under one name in the current epoch of a stage, on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from raylight.worker.metrics.epoch_shares import Flags, Pairs, Reduce, fold, make_pairs
from raylight.worker.metrics.logged_values import Metric, Number, newest_of, read

NewestNumber = tuple[Number, Number]
"""The value of the last step that logged it, and its weight."""


@dataclass(slots=True, eq=False)
class Series:
    """Everything logged under one name in the current epoch."""

    stage: str
    name: str
    on_step: bool
    on_epoch: bool
    reduce: Reduce
    prog_bar: bool
    logger: bool
    metric: Metric | None = None  # which reduces itself
    both: bool = False  # asked for per step and per epoch, so that the names carry a suffix
    values: list[Number] = field(default_factory=list)
    weights: list[Number] = field(default_factory=list)
    folded: Pairs = field(default_factory=list)
    last: NewestNumber | None = None  # of the values that are folded: the newest, and its weight
    at: int = 0  # the batch in which it was logged last
    fresh: bool = False  # logged since the last row
    touched: bool = False  # the metric was logged since its last reset
    guessed: bool = False  # a value was weighted by a batch size that nobody has given

    def add(self, number: Number, weight: Number, at: int) -> None:
        """Logged in batch `at`."""
        self.values.append(number)
        self.weights.append(weight)
        self.at, self.fresh = at, True

    def add_metric(self, metric: Metric, at: int) -> None:
        """Logged in batch `at`; it may be another object than in the epoch before."""
        self.metric, self.touched, self.at, self.fresh = metric, True, at, True

    def note_guess(self) -> None:
        self.guessed = True

    @property
    def step_reduce(self) -> str:
        return self.reduce if isinstance(self.reduce, str) else "mean"

    @property
    def step_name(self) -> str:
        return f"{self.name}_step" if self.both else self.name

    @property
    def flags(self) -> Flags:
        reduce = "metric" if self.metric is not None else self.reduce if isinstance(self.reduce, str) else "callable"
        return reduce, self.both, self.on_epoch, self.prog_bar, self.logger

    @property
    def is_used(self) -> bool:
        """Whether anything was logged in this epoch."""
        return bool(self.values or self.folded or self.last or self.touched)

    def newest(self) -> NewestNumber | None:
        """The value of the last step that logged it, and its weight."""
        if self.metric is not None:
            return (newest_of(self.name, self.metric), 1.0) if self.touched else None
        return (self.values[-1], self.weights[-1]) if self.values else self.last

    def take_fresh(self) -> NewestNumber | None:
        """What belongs into the next row, once; of what is logged per step alone nothing older is kept."""
        newest = self.newest() if self.on_step and self.fresh else None
        if newest is not None:
            self.fresh = False
            if not self.on_epoch:
                del self.values[:-1], self.weights[:-1]
        return newest

    def cut(self, count: int) -> tuple[list[Number], list[Number]]:
        """Takes away the values after the first `count`, and their weights."""
        cut = self.values[count:], self.weights[count:]
        del self.values[count:], self.weights[count:]
        return cut

    def put_back(self, values: list[Number], weights: list[Number]) -> None:
        """What `cut` took away."""
        self.values += values
        self.weights += weights
        self.fresh = True

    def reopen(self, has_metric_kept: bool) -> None:
        """Its epoch has not ended after all. The numbers are with who carries them; the metric has its own."""
        self.values, self.weights, self.folded = [], [], []
        self.touched |= has_metric_kept

    def stand_at(self, last: NewestNumber | None, at: int) -> None:
        """The newest step value again, and its batch."""
        self.last, self.at = last, at

    def fold(self) -> Pairs:
        """Replaces the values by their reduction so far; a callable needs them all, so they only leave the device.
        Of what is logged per step alone the newest is kept."""
        if self.values:
            self.last = self.values[-1], self.weights[-1]
            if self.on_epoch:
                numbers = read([*self.values, *self.weights])
                values, weights = numbers[: len(self.values)], numbers[len(self.values) :]
                self.folded = fold(self.reduce, self.folded + make_pairs(self.reduce, values, weights))
            self.values, self.weights = [], []
        return self.folded

    def forget(self) -> None:
        """The epoch is over, or does not count; a metric keeps its state."""
        self.values, self.weights, self.folded, self.last = [], [], [], None
        self.fresh = self.touched = False

    def begin_anew(self) -> None:
        if self.metric is not None and self.touched:
            self.metric.reset()
        self.forget()
