"""Loggers: all loggers of a run. None of them can stop it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence

from raylight.contract.kinds import Value
from raylight.contract.messages import Item, LoggerCall
from raylight.driver.logger_feed import Logger, LoggerFeed
from raylight.driver.run_record import describe_error


class Loggers:
    """Passes each value, call and event to the loggers it is for. What one raises is told to the person, once a
    logger; it is asked again all the same, unless it could not be opened."""

    def __init__(self, loggers: Sequence[Logger], warn: Callable[[str], None]):
        self.all = list(loggers)
        self._warn = warn
        self._feeds = [LoggerFeed(logger) for logger in loggers]
        self._closed: set[int] = set()
        self._told: set[int] = set()

    def is_open(self, index: int) -> bool:
        return index not in self._closed

    def open(self, module: Value) -> None:
        """Before training: a service that cannot be reached is found now, and left out of this run."""
        for index, logger in enumerate(self.all):
            if not self._attempt(index, "be opened, and gets nothing of this run", _open, logger):
                self._closed.add(index)
        self._each("log_graph", "log the graph", module)

    def give(self, values: dict[str, float], step: int, epoch: int, moment: float, only: int | None = None) -> None:
        """One row; `only`: for this logger alone."""
        for index, feed in enumerate(self._feeds):
            if only in (None, index):
                self._attempt(index, "log values", feed.give, values, step, epoch, moment)

    def call(self, message: LoggerCall) -> None:
        """Does what a hook on a worker asked for."""
        what = "".join(f"[{part.key!r}]" if isinstance(part, Item) else f".{part}" for part in message.path)
        self._attempt(message.logger, f"do {what[1:]}", _call, self.all[message.logger], message)

    def log_hyperparameters(self, values: Mapping[str, Value]) -> None:
        self._each("log_hyperparams", "log the hyperparameters", dict(values))

    def after_save_checkpoint(self, saved: Value) -> None:
        """`saved` has the attributes of a ModelCheckpoint."""
        self._each("after_save_checkpoint", "take a checkpoint", saved)

    def redo_from(self, step: int) -> None:
        """The steps after this one are made again."""
        for index, feed in enumerate(self._feeds):
            self._attempt(index, "take values back", feed.redo_from, step)

    def close(self, status: str) -> None:
        for index, logger in enumerate(self.all):
            self._attempt(index, "store all that was logged", _close, logger, status)

    def _each(self, method: str, what: str, argument: Value) -> None:
        for index, logger in enumerate(self.all):
            if hasattr(logger, method):
                self._attempt(index, what, getattr(logger, method), argument)

    def _attempt(self, index: int, what: str, action: Callable[..., object], *args: Value) -> bool:
        """Whether it worked."""
        if index in self._closed:
            return False
        try:
            action(*args)
        except Exception as error:
            if index not in self._told:
                self._told.add(index)
                self._warn(
                    f"{type(self.all[index]).__name__} could not {what}: {describe_error(error)}. Training goes on; "
                    "whatever else fails in this logger is not said"
                )
            return False
        return True


def _open(logger: Logger) -> object:
    """raylight's own files were opened as the run was claimed."""
    return None if hasattr(logger, "attach") else getattr(logger, "experiment", None)


def _call(logger: Value, message: LoggerCall) -> None:
    args, kwargs = pickle.loads(message.arguments)
    found = logger
    for part in message.path:
        found = found[part.key] if isinstance(part, Item) else getattr(found, part)
    found(*args, **kwargs)


def _close(logger: Value, status: str) -> None:
    if hasattr(logger, "finalize"):
        logger.finalize("success" if status != "failed" else "failed")
    elif hasattr(logger, "close"):
        logger.close()
