"""LoggerFeed: gives a logger each row once, through failures too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Protocol


class Logger(Protocol):
    """A destination of aggregated values: TensorBoard, CSV, or the user's own."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> object: ...


class LoggerFeed:
    """Hands rows to a logger of raylight's own, or of anybody's.

    After a failure steps may be made again. One that has `drop_after` takes their rows back; another, such as a
    service, cannot, and is not given again what it has.
    """

    def __init__(self, logger: Logger):
        self._log: Callable[..., object] = logger.log_metrics
        self._takes_time = "seconds" in inspect.signature(logger.log_metrics).parameters
        self._drop_after: Callable[[int], object] | None = getattr(logger, "drop_after", None)
        self._last = -1  # the newest step of which it has a row
        self._names: set[str] = set()  # which it has of that step
        self._redoes = False

    def give(self, values: dict[str, float], step: int, epoch: int, moment: float) -> None:
        """`moment`: when it was measured, in seconds since 1970, which loggers of others do not ask for."""
        if self._redoes:
            if step < self._last:
                return
            if step == self._last:
                values = {name: value for name, value in values.items() if name not in self._names}
        if not values:
            return
        if step > self._last:
            self._last, self._names, self._redoes = step, set(), False
        if step == self._last:
            self._names |= values.keys()
        row = {**values, "epoch": epoch}
        if self._takes_time:
            self._log(row, step, seconds=moment)
        else:
            self._log(row, step)

    def redo_from(self, step: int) -> None:
        """The steps after this one are made again."""
        if self._drop_after is not None:
            self._drop_after(step)
            self._last = -1
        else:
            self._redoes = True
