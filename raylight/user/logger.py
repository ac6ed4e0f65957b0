"""Logger: a receiver of values and hyperparameters, for a person to subclass, by Lightning's names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Protocol

from raylight.contract.kinds import Value
from raylight.contract.rank_zero import get_rank


class TakesMetrics(Protocol):
    """One of raylight.loggers, Lightning's or your own: it has log_metrics(metrics, step)."""

    def log_metrics(self, metrics: Value, step: Value, /) -> Value: ...


class Logger(TakesMetrics):
    """A receiver of values and hyperparameters. Loggers run in the driver, on values that are merged over all ranks.

    To be one, an object needs `log_metrics(metrics, step)` and no base class; of the other methods, those that it has
    are called. A method that raises does not stop the run: the person is told once.
    """

    @property
    def name(self) -> str | None:
        """The experiment."""
        return None

    @property
    def version(self) -> int | str | None:
        """The run within the experiment."""
        return None

    @property
    def save_dir(self) -> str | None:
        """Where all experiments lie; None if nothing is written on this machine."""
        return None

    @property
    def root_dir(self) -> str | None:
        """Where all versions of the experiment lie."""
        return None

    @property
    def log_dir(self) -> str | None:
        """Where this version lies."""
        return None

    @property
    def group_separator(self) -> str:
        """Stands between a group of metrics and a name in it."""
        return "/"

    @property
    def experiment(self) -> Value:
        """The object that this logger writes with. Opened before training begins."""
        return self

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None) -> None:
        """`step` counts optimizer steps. `metrics` has the epoch too, under "epoch"."""

    def log_hyperparams(self, params: Value, *args: Value, **kwargs: Value) -> None:
        """`params` is a dict or a namespace."""

    def log_graph(self, model: Value, input_array: Value = None) -> None:
        """Called once, before training, with the module."""

    def save(self) -> None:
        """Writes what is still held."""

    def finalize(self, status: str) -> None:
        """The run is over; `status` is "success" or "failed". More may be logged after it."""
        self.save()

    def after_save_checkpoint(self, checkpoint_callback: Value) -> None:
        """A checkpoint is on storage. `checkpoint_callback` has the attributes of a `ModelCheckpoint`."""


class DummyExperiment:
    """Takes every call and item, and does nothing."""

    def nop(self, *args: Value, **kwargs: Value) -> None:
        """What every method is."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.nop

    def __getitem__(self, key: Value) -> DummyExperiment:
        return self

    def __setitem__(self, key: Value, value: Value) -> None:
        """Kept nowhere."""


class DummyLogger(Logger):
    """The logger of a run that keeps nothing, as with `fast_dev_run`: calls work and do nothing."""

    def __init__(self) -> None:
        self._experiment = DummyExperiment()

    @property
    def experiment(self) -> DummyExperiment:
        return self._experiment

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def __getitem__(self, index: int) -> DummyLogger:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return DummyExperiment.nop.__get__(self.__dict__.get("_experiment"), DummyExperiment)


def rank_zero_experiment(function: Callable[..., Value]) -> Callable[..., Value]:
    """Decorates the getter of `experiment`: on other ranks than 0 it gives a DummyExperiment."""

    @functools.wraps(function)
    def experiment(self: Value) -> Value:
        return DummyExperiment() if get_rank() > 0 else function(self)

    return experiment


def on_worker(method: Callable[..., Value]) -> Callable[..., Value]:
    """Marks a method of a logger that needs the worker's own objects, such as a model's gradients or a local file. It
    runs where it is called, with the worker's view of the logger as `self`; others are passed to the driver."""
    setattr(method, ON_WORKER, True)
    return method


ON_WORKER = "_runs_on_worker"
