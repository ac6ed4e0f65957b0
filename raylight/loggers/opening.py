"""The loggers of one run: from the trainer's argument `logger` to what hooks see of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import cloudpickle

from raylight.contract.kinds import Value
from raylight.contract.plain_numbers import to_python
from raylight.contract.task import LoggerView
from raylight.driver.loggers import Loggers
from raylight.loggers.file_logger import FileLogger
from raylight.loggers.tensorboard import TensorBoardLogger
from raylight.user.logger import DummyLogger

if TYPE_CHECKING:
    from raylight.storage.filesystem import Storage


def make_loggers(setting: Value, files: Storage | None) -> list[Value]:
    """The loggers of a run whose version has these files; None if it has none, as predict.

    True means TensorBoard, False none; a logger or a list of them is taken as it is.
    """
    if setting is True:
        setting = TensorBoardLogger()
    given = list(setting) if isinstance(setting, list | tuple) else [setting] if setting else []
    loggers: list[Value] = []
    for logger in given:
        if isinstance(logger, FileLogger):
            if files is None and logger.save_dir is None:
                logger = DummyLogger()
            else:
                logger.attach(files)
        loggers.append(logger)
    return loggers


EXPERIMENT_FACTS = (
    "id", "name", "url", "dir", "project", "entity", "group", "path", "log_dir", "project_name", "workspace",
    "tracking_uri", "offline",
)  # fmt: skip
"""Attributes of experiments of the known services that hooks read."""


def describe_loggers(loggers: Loggers, is_local: bool) -> tuple[LoggerView, ...]:
    """Each logger for the workers; `is_local`: they are in this process."""
    views = []
    for index, logger in enumerate(loggers.all):
        is_open = loggers.is_open(index)
        views.append(LoggerView(logger, is_open) if is_local else _describe(logger, is_open))
    return tuple(views)


def _describe(logger: Value, is_open: bool) -> LoggerView:
    names, facts = None, {"log_dir": getattr(logger, "log_dir", None)}
    if is_open and not isinstance(logger, FileLogger):  # whose experiment costs an import and a file: its first call
        experiment = getattr(logger, "experiment", None)
        names = None if hasattr(type(experiment), "__getattr__") else frozenset(dir(experiment))
        facts = _read(experiment, [*getattr(experiment, "__dict__", ()), *EXPERIMENT_FACTS])
    return LoggerView(
        is_open=is_open,
        kind=_pickle_class(type(logger)),
        facts=_read(logger, [*vars(logger), *_properties(type(logger))]),
        experiment_names=names,
        experiment_facts=facts,
    )


def _pickle_class(kind: type) -> bytes:
    """A class of a script goes by value."""
    try:
        return cloudpickle.dumps(kind)
    except Exception:  # it holds something that stays here; hooks then see a Logger
        return b""


def _properties(kind: type) -> list[str]:
    names = (name for base in kind.__mro__ for name, item in vars(base).items() if isinstance(item, property))
    return [name for name in dict.fromkeys(names) if name != "experiment"]


def _read(owner: Value, names: Iterable[str]) -> dict[str, Value]:
    """The attributes that are plain values."""
    found = {}
    for name in names:
        try:
            value = to_python(getattr(owner, name))
        except Exception:  # a property of a service may ask its server; the hook then reads none
            continue
        if _is_plain(value):
            found[name] = value
    return found


def _is_plain(value: Value) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or type(value) in (bool, int, float, str, bytes)
