"""Attributes of the trainer that are read from their owner: a `Fact` from the run, a `Setting` from the arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar, overload

from raylight.user.run_view import RunView

if TYPE_CHECKING:
    from raylight.contract.config import Config

T = TypeVar("T")


class Owner(Protocol):
    """A trainer, as its forwarding names read it."""

    config: Config
    _view: RunView


class Fact(Generic[T]):
    """A name whose value the run owns: read from the trainer's view, never kept. Its documentation is RunView's."""

    def __init__(self, name: str = "", change: Callable[[RunView, T], None] | None = None):
        self._name, self._change = name, change

    def __set_name__(self, owner: type, name: str) -> None:
        self._public = name
        self._name = self._name or name
        self.__doc__ = getattr(RunView, self._name).__doc__

    @overload
    def __get__(self, trainer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, trainer: Owner, owner: type) -> T: ...
    def __get__(self, trainer: Owner | None, owner: type) -> T | Self:
        if trainer is None:
            return self
        found: T = getattr(trainer._view, self._name)
        return found

    def __set__(self, trainer: Owner, value: T) -> None:
        if self._change is None:
            raise AttributeError(f"trainer.{self._public} can be read and not set")
        self._change(trainer._view, value)


class Setting(Generic[T]):
    """A name whose value is an argument of the trainer; documented at the field of `Config`."""

    def __init__(self, field: str = ""):
        self._field = field

    def __set_name__(self, owner: type, name: str) -> None:
        self._public = name
        self._field = self._field or name
        self.__doc__ = f"The argument {self._field!r}, as resolved."

    @overload
    def __get__(self, trainer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, trainer: Owner, owner: type) -> T: ...
    def __get__(self, trainer: Owner | None, owner: type) -> T | Self:
        if trainer is None:
            return self
        found: T = getattr(trainer.config, self._field)
        return found

    def __set__(self, trainer: Owner, value: T) -> None:
        raise AttributeError(f"trainer.{self._public} is an argument and cannot be changed: Trainer({self._field}=...)")
