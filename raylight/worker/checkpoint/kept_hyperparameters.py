"""The hyperparameters of a module or data module in a checkpoint: written with their types, and read for a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter

from raylight.contract.errors import CheckpointMismatch, RaylightError
from raylight.contract.kinds import StateDict, Value
from raylight.worker.checkpoint.named_code import NamedCode
from raylight.worker.checkpoint.typed_values import NotStorable, read, read_filled, write, write_shell

MODULE_KEY, DATA_MODULE_KEY = "hyper_parameters", "datamodule_hyper_parameters"
_UNSAVED, _ARGUMENT = "_unsaved", "_argument"


def write_hyperparameters(owner: Value, values: Mapping[str, Value], key: str) -> tuple[StateDict, dict[str, str]]:
    """The entries of a checkpoint for `values`, the hyperparameters of `owner` under `key`; and what cannot be stored,
    by name with the reason. That is noted in the checkpoint, so that a reader asks for it."""
    stored: StateDict = {}
    unsaved: dict[str, str] = {}
    for name, value in values.items():
        try:
            stored[name] = write(value, name)
        except NotStorable as error:
            unsaved[name] = str(error)
    entries: StateDict = {key: stored}
    argument = getattr(owner, "__dict__", {}).get("_hparams_argument")
    if argument is not None:
        name, held, keys = argument
        try:
            entries[key + _ARGUMENT] = {"name": name, "shell": write_shell(held, name), "keys": list(keys)}
        except NotStorable as error:
            unsaved[name] = str(error)
    if unsaved:
        entries[key + _UNSAVED] = unsaved
    return entries, unsaved


@dataclass(slots=True)
class Kept:
    """What a checkpoint has kept for a class."""

    values: StateDict = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """What `save_hyperparameters` was given and is not in `values`, with the reason."""
    argument: Argument | None = None

    def arguments(self, overrides: Mapping[str, Value], parameters: Mapping[str, Value]) -> StateDict:
        """What `__init__`, which takes `parameters`, is called with; `overrides` win. One for a name in the object
        that was an argument as a whole goes into that object. Raises CheckpointMismatch naming all that is missing."""
        argument = self.argument
        if argument is None or argument.name not in parameters or argument.name in overrides:
            inner: set[str] = set(argument.keys) - parameters.keys() if argument is not None else set()
            self._check({name: why for name, why in self.missing.items() if name not in inner}, overrides, parameters)
            return {name: value for name, value in self.values.items() if name not in inner} | dict(overrides)
        outer = {name: value for name, value in self.values.items() if name not in argument.keys}
        into = {name: value for name, value in overrides.items() if name in argument.keys and name not in parameters}
        self._check(self.missing, overrides, {**parameters, **dict.fromkeys(argument.keys)})
        whole = argument.make(into)
        return {**outer, argument.name: whole, **{name: it for name, it in overrides.items() if name not in into}}

    def _check(self, missing: Mapping[str, str], given: Mapping[str, Value], parameters: Mapping[str, Value]) -> None:
        takes_all = any(getattr(it, "kind", None) is Parameter.VAR_KEYWORD for it in parameters.values())
        mistakes = [
            f"the checkpoint does not hold {name!r} ({why}), and a default may be another value than the one that was "
            f"trained with. Give it: load_from_checkpoint(path, {name}=...)"
            for name, why in missing.items()
            if name not in given and (name in parameters or takes_all)
        ]
        if mistakes:
            raise CheckpointMismatch("\n".join(mistakes))


@dataclass(slots=True)
class Argument:
    """An argument of `__init__` whose items are the hyperparameters, as by `save_hyperparameters(conf)`."""

    name: str
    keys: list[str]
    shell: StateDict
    items: StateDict  # as they are stored
    code: NamedCode

    def make(self, changes: Mapping[str, Value]) -> Value:
        items = {key: self.items.get(key) for key in self.keys if key in self.items or key in changes}
        try:
            made = read_filled(self.shell, items, self.code)
        except Exception as error:  # what a file of somebody else's leads to
            raise CheckpointMismatch(
                f"the checkpoint's {self.name!r} {error}. Give it: load_from_checkpoint(path, {self.name}=...)"
            ) from error
        for key, value in changes.items():
            if isinstance(made, Mapping):
                made[key] = value  # type: ignore[index]
            else:
                object.__setattr__(made, key, value)
        return made


def read_hyperparameters(entries: Mapping[str, Value], owner: type, key: str = MODULE_KEY) -> Kept:
    """What `entries` of a checkpoint hold under `key`, with classes and functions that `owner`'s code names."""
    code = NamedCode(owner)
    kept = Kept(missing=dict(entries.get(key + _UNSAVED, {})))
    stored = entries.get(key, {})
    for name, value in stored.items():
        try:
            kept.values[name] = read(value, code)
        except RaylightError as error:
            kept.missing[name] = f"{name} {error}"
        except Exception as error:  # what a file of somebody else's leads to
            kept.missing[name] = f"{name} cannot be read: {type(error).__name__}: {error}"
    argument = entries.get(key + _ARGUMENT)
    if argument is not None:
        kept.argument = Argument(argument["name"], argument["keys"], argument["shell"], stored, code)
    return kept
