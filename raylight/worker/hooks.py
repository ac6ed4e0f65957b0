"""Hooks: the user's code by the names of the hooks. Found once; a hook that nobody wrote is not called at all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.kinds import Batch, Hook, Output
from raylight.user.callback import Callback
from raylight.user.data_module import DataModule
from raylight.user.module import Module
from raylight.user.overriding import overrides
from raylight.user.trainer_names import TrainerNames


class Hooks:
    """The hooks of one rank: those of its callbacks, then the module's, bound and ready to be called."""

    def __init__(
        self, trainer: TrainerNames, module: Module, data_module: DataModule | None, callbacks: Iterable[Callback]
    ):
        self.trainer, self.module, self.data_module = trainer, module, data_module
        self.callbacks = in_order(callbacks)
        self._found: dict[str, tuple[Hook, ...]] = {}

    def attach(self) -> None:
        """The module and the data module know the trainer from here on."""
        self.module.trainer = self.trainer
        if self.data_module is not None:
            self.data_module.trainer = self.trainer

    def detach(self) -> None:
        self.module.trainer = None

    def replace_module(self, module: Module) -> None:
        """Another object takes the module's place, such as one with its layers converted."""
        self.module = module
        self._found.clear()

    def add_callbacks(self, callbacks: Iterable[Callback]) -> None:
        """A callback of `configure_callbacks` replaces one of the same type."""
        added = list(callbacks)
        kinds = {type(callback) for callback in added}
        self.callbacks = in_order([c for c in self.callbacks if type(c) not in kinds] + added)
        self._found.clear()

    def of(self, name: str) -> tuple[Hook, ...]:
        """The callbacks' hooks of this name, then the module's."""
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = (*self.of_callbacks(name), *self.of_module(name))
        return found

    def of_callbacks(self, name: str, callbacks: Iterable[Callback] | None = None) -> tuple[Hook, ...]:
        callbacks = self.callbacks if callbacks is None else callbacks
        return tuple(self._bind(callback, name) for callback in callbacks if overrides(callback, name))

    def of_module(self, name: str) -> tuple[Hook, ...]:
        return (getattr(self.module, name),) if self.overrides(name) else ()

    def at_epoch_end(self) -> list[tuple[Hook, ...]]:
        """`on_train_epoch_end` in two turns: callbacks that judge values come after everything that logs one."""
        name = "on_train_epoch_end"
        last = [callback for callback in self.callbacks if callback._judges_values]
        first = [callback for callback in self.callbacks if callback not in last]
        turns = ((*self.of_callbacks(name, first), *self.of_module(name)), self.of_callbacks(name, last))
        return [turn for turn in turns if turn]

    def overrides(self, name: str) -> bool:
        """Whether the module has a hook of its own."""
        return overrides(self.module, name)

    def call(self, name: str, *arguments: Any) -> None:
        for hook in self.of(name):
            hook(*arguments)

    def owner_of(self, name: str) -> Module | DataModule | None:
        """Whose hook of this name counts, if both may have one: the data module's, else the module's."""
        if self.data_module is not None and overrides(self.data_module, name):
            return self.data_module
        return self.module if self.overrides(name) else None

    def _bind(self, callback: Callback, name: str) -> Hook:
        hook = getattr(callback, name)
        return lambda *arguments: hook(self.trainer, self.module, *arguments)


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """As they were given, and those that save the state of others at the end."""
    return sorted(callbacks, key=lambda callback: callback._comes_last)


def bind_step(function: Hook, several: bool = False) -> Callable[[Batch, int, int], Output]:
    """A step that takes (batch), (batch, batch_idx) or all three, as a function of all three. `*args` get the third
    only if there are `several` loaders."""
    parameters = inspect.signature(function).parameters.values()
    if several and not takes_loader_index(function):
        raise InvalidArguments(
            f"{function.__qualname__} has no argument dataloader_idx, and there are several loaders: write (self, "
            "batch, batch_idx, dataloader_idx=0)"
        )
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return function if several else lambda batch, batch_idx, dataloader_idx: function(batch, batch_idx)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not names:
        raise DataError(f"{function.__qualname__} takes no batch; its signature is (self, batch, batch_idx)")
    if len(names) == 1:
        return lambda batch, batch_idx, dataloader_idx: function(batch)
    if len(names) == 2:
        if names[1] == "dataloader_idx":
            return lambda batch, batch_idx, dataloader_idx: function(batch, dataloader_idx)
        return lambda batch, batch_idx, dataloader_idx: function(batch, batch_idx)
    return function


def takes_loader_index(function: Hook) -> bool:
    """Whether a step can be told which of several loaders its batch comes from."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    return takes_all or "dataloader_idx" in parameters or len(parameters) >= 3


def takes_outputs(hook: Hook) -> bool:
    """Whether an `..._epoch_end` hook wants the outputs, or is called bare."""
    return bool(inspect.signature(hook).parameters)
