"""`trainer.loggers` in hooks: for each logger of the run an object that acts for it."""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Callable, Mapping

from raylight.contract.kinds import Value
from raylight.contract.messages import EpochMetrics, Hyperparameters, Item, LoggerCall
from raylight.contract.plain_numbers import to_python
from raylight.contract.task import LoggerView
from raylight.user.logger import ON_WORKER, DummyExperiment, Logger
from raylight.worker.metrics.call_packing import pack
from raylight.worker.worker import Worker


class LoggerProxy:
    """Stands for one logger of the run, and counts as an instance of its class.

    Values and hyperparameters go to the driver, which owns the loggers, from rank 0. In the driver's own process all
    else is the logger's. On a worker attributes are those that it had when the run began; its methods are called in
    the driver, for rank 0; and what is called on `experiment` is called there too, for every rank, in the rank's order.
    """

    def __init__(self, worker: Worker, index: int, view: LoggerView):
        kind = type(view.logger) if view.logger is not None else _unpickle(view.kind)
        vars(self).update(_worker=worker, _index=index, _view=view, _kind=kind, _has_told=False)

    @property  # type: ignore[misc]  # what isinstance asks
    def __class__(self) -> type:
        kind: type = vars(self)["_kind"]
        return kind

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None) -> None:
        """Rank 0's values alone are kept; `step` counts optimizer steps and defaults to the present one."""
        worker = self._worker
        if not worker.is_first:
            return
        step = worker.progress.global_step if step is None else int(step)
        values = {name: float(value) for name, value in metrics.items()}
        logged, epoch = frozenset(values), worker.progress.current_epoch
        worker.outbox.put(
            EpochMetrics(worker.stage, epoch, step, time.time(), values, logged, frozenset(), logger=self._index)
        )

    def log_hyperparams(self, params: Value, metrics: Mapping[str, Value] | None = None, *_: Value) -> None:
        """Adds to the hyperparameters that the run records; `params` is a dict or a namespace. `metrics` are logged."""
        if self._worker.is_first:
            self._worker.outbox.put(Hyperparameters(dict(params if isinstance(params, Mapping) else vars(params))))
        if metrics:
            self.log_metrics(metrics)

    @property
    def experiment(self) -> Value:
        """The logger's experiment, or on a worker what passes calls on to it."""
        if not self._view.is_open:
            return DummyExperiment()
        if self._view.logger is not None:
            return self._view.logger.experiment
        return Recorder(self._send, ("experiment",), self._view.experiment_names, self._view.experiment_facts)

    def after_save_checkpoint(self, checkpoint_callback: Value) -> None:
        """Takes the callback itself, or what can be read of it where it must travel."""
        self._call("after_save_checkpoint", checkpoint_callback)

    def __getattr__(self, name: str) -> Value:
        real, facts = self._view.logger, self._view.facts
        if real is not None:
            found = getattr(real, name)
            is_method = callable(found) and hasattr(type(real), name)
            return self._guard(name, found) if is_method and self._view.is_open else found
        if name in facts:
            return facts[name]
        found = getattr(self._kind, name)  # an AttributeError here names the logger's class
        if isinstance(found, property):
            raise AttributeError(
                f"{self._kind.__name__}.{name} stays in the driver: on a worker plain values alone can be read"
            )
        if hasattr(found, ON_WORKER):
            return self._guard(name, functools.partial(found, self))
        return functools.partial(self._call, name) if callable(found) else found

    def __setattr__(self, name: str, value: Value) -> None:
        if self._view.logger is not None:
            setattr(self._view.logger, name, value)
        else:
            self._view.facts[name] = value

    def __repr__(self) -> str:
        return f"<{self._kind.__name__}, as hooks see it>"

    def _call(self, name: str, *args: Value, **kwargs: Value) -> Value:
        if self._view.logger is not None:
            return self._guard(name, getattr(self._view.logger, name))(*args, **kwargs)
        if self._worker.is_first:
            self._send((name,), args, kwargs)
        return None

    def _send(self, path: tuple[str | Item, ...], args: tuple[Value, ...], kwargs: dict[str, Value]) -> None:
        if self._view.is_open:
            self._worker.outbox.put(LoggerCall(self._index, path, pack((args, kwargs))))

    def _guard(self, name: str, method: Callable[..., Value]) -> Callable[..., Value]:
        """A logger that raises does not stop the run; the person is told once."""

        @functools.wraps(method)
        def call(*args: Value, **kwargs: Value) -> Value:
            try:
                return method(*args, **kwargs)
            except Exception as error:
                if not self._has_told:
                    vars(self)["_has_told"] = True
                    text = f"{self._kind.__name__}.{name} raised {type(error).__name__}: {error}. Training goes on"
                    self._worker.outbox.notice(f"{text}; whatever else fails in this logger is not said", "warning")
                return None

        return call


class Recorder:
    """Stands for an object of the driver. Calls on it, and on what is reached from it by names and in brackets, are
    made there, and return None here; its plain attributes can be read."""

    def __init__(
        self,
        send: Callable[[tuple[str | Item, ...], tuple[Value, ...], dict[str, Value]], None],
        path: tuple[str | Item, ...],
        names: frozenset[str] | None = None,
        facts: Mapping[str, Value] | None = None,
    ):
        vars(self).update(_send=send, _path=path, _names=names, _facts=facts or {})

    def __getattr__(self, name: str) -> Value:
        if name in self._facts:
            return self._facts[name]
        if (name.startswith("__") and name.endswith("__")) or (self._names is not None and name not in self._names):
            raise AttributeError(f"{self!r} has no attribute {name!r}")
        return Recorder(self._send, (*self._path, name))

    def __getitem__(self, key: Value) -> Recorder:
        return Recorder(self._send, (*self._path, Item(to_python(key))))

    def __call__(self, *args: Value, **kwargs: Value) -> None:
        self._send(self._path, args, kwargs)

    def __setitem__(self, key: Value, value: Value) -> None:
        self._send((*self._path, "__setitem__"), (key, value), {})

    def __delitem__(self, key: Value) -> None:
        self._send((*self._path, "__delitem__"), (key,), {})

    def __setattr__(self, name: str, value: Value) -> None:
        self._send((*self._path, "__setattr__"), (name, value), {})

    def __iter__(self) -> Value:
        raise TypeError(f"{self!r} is in the driver and cannot be read here")

    def __repr__(self) -> str:
        path = "".join(f"[{part.key!r}]" if isinstance(part, Item) else f".{part}" for part in self._path)
        return f"<logger{path} in the driver>"


def _unpickle(kind: bytes) -> type:
    """The logger's class; Logger where this machine has not got it."""
    try:
        found: type = pickle.loads(kind)
    except Exception:  # its library may be installed in the driver alone
        return Logger
    return found
