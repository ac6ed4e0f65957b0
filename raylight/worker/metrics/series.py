"""What was logged under one name in the current epoch of a stage, on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raylight.worker.metrics.epoch_shares import Flags, Pairs, Reduce, fold, make_pairs
from raylight.worker.metrics.logged_values import newest_of, read


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
    metric: Any = None  # a torchmetrics object, which reduces itself
    values: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    folded: Pairs = field(default_factory=list)
    last: tuple[Any, Any] | None = None  # of the values that are folded: the newest, and its weight
    at: int = 0  # the batch in which it was logged last
    fresh: bool = False  # logged since the last row
    touched: bool = False  # the metric was logged since its last reset
    both: bool = False  # asked for per step and per epoch, so that the names carry a suffix
    guessed: bool = False  # a value was weighted by a batch size that nobody has given

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

    def newest(self) -> tuple[Any, Any] | None:
        """The value of the last step that logged it, and its weight."""
        if self.metric is not None:
            return (newest_of(self.name, self.metric), 1.0) if self.touched else None
        return (self.values[-1], self.weights[-1]) if self.values else self.last

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
        if self.touched:
            self.metric.reset()
        self.forget()
