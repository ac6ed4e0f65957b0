"""ServiceLogger: what loggers share that write through the library of a service."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.user.logger import Logger


class ServiceLogger(Logger):
    """A logger that writes through the library of a service, which is loaded once it is needed.

    A copy in another process, such as a trial of a sweep, opens an experiment of its own and ends it with its run.
    """

    _live: tuple[str, ...] = ("_experiment",)
    """Attributes that stay in this process."""
    _experiment: Value = None
    _is_copy = False

    @property
    def experiment(self) -> Value:
        if self._experiment is None:
            self._experiment = self._start()
        return self._experiment

    def _start(self) -> Value:
        """Opens the experiment."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Value]:
        return {name: None if name in self._live else value for name, value in vars(self).items()} | {"_is_copy": True}


def require(owner: str, module: str, extra: str) -> None:
    """Raises if the library is not installed. Nothing is imported."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(
            f"{owner} needs the package {module}, which is not installed: pip install 'raylight[{extra}]'"
        )


def check_choice(owner: str, name: str, value: Value, choices: tuple[Value, ...]) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        allowed = ", ".join(repr(choice) for choice in choices)
        raise InvalidArguments(f"{owner}: {name}={value!r}; it takes {allowed}")


def rename(owner: str, given: dict[str, Value], names: Mapping[str, str], warn: Callable[[str], None]) -> None:
    """Arguments that a library has renamed, under their new names."""
    for old, new in names.items():
        if old in given:
            warn(f"{owner}: {old} is now called {new}")
            given.setdefault(new, given.pop(old))
