"""HyperparametersMixin: the arguments of `__init__` kept, for checkpoints and loggers."""

from __future__ import annotations

import copy
import inspect
from types import FrameType
from typing import ClassVar

from torch import Tensor, nn

from raylight.contract.kinds import Value
from raylight.contract.rank_zero import rank_zero_warn
from raylight.user.given_hyperparameters import CLI_KEYS, find_given_hyperparameters
from raylight.user.init_arguments import choose_hyperparameters, collect_arguments


class AttributeDict(dict[str, Value]):
    """A dict whose keys are attributes too: `hparams.lr` is `hparams["lr"]`."""

    def __getattr__(self, name: str) -> Value:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there are {sorted(self)}") from None

    def __setattr__(self, name: str, value: Value) -> None:
        self[name] = value


class HyperparametersMixin:
    """What a module and a data module have; any other class may have it too."""

    _hparams: AttributeDict
    _hparams_initial: AttributeDict
    _log_hyperparams: bool = False
    __jit_unused_properties__: ClassVar[list[str]] = ["hparams", "hparams_initial"]

    def save_hyperparameters(
        self, *names: object, ignore: str | list[str] | None = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """Keep the arguments of `__init__` in `hparams`, and in checkpoints: all, those named, or the items of one
        dict, Namespace, dataclass or DictConfig, which `load_from_checkpoint` puts together again. Works before
        `super().__init__()` too.

        `ignore` names arguments that are left out. `frame` is that of another `__init__`, if its arguments are meant.
        With `logger=False` loggers do not get them.
        """
        arguments = find_given_hyperparameters(self)
        if arguments is None:
            arguments = collect_arguments(self, frame or inspect.currentframe().f_back)  # type: ignore[union-attr]
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        found, argument = choose_hyperparameters(names, arguments)
        self.hparams.update({name: value for name, value in found.items() if name not in ignored})
        for name in ignored:
            self.hparams.pop(name, None)
        self.__dict__["_log_hyperparams"] = logger
        self.__dict__["_hparams_initial"] = _copied(self.hparams)
        if argument is not None:
            self.__dict__["_hparams_argument"] = argument
        for name, value in found.items():
            if isinstance(value, nn.Module) and name not in ignored:
                rank_zero_warn(
                    f"save_hyperparameters keeps the module {name!r}, whose weights checkpoints have anyway: pass "
                    f"ignore=[{name!r}]"
                )

    @property
    def hparams(self) -> AttributeDict:
        """The hyperparameters that `save_hyperparameters` kept; keys are attributes too. It may be changed."""
        return self.__dict__.setdefault("_hparams", AttributeDict())

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of the hyperparameters as `save_hyperparameters` kept them; loggers get these."""
        return _copied(self.__dict__.get("_hparams_initial", AttributeDict()))


def merge_logged(module: HyperparametersMixin, data_module: HyperparametersMixin | None) -> dict[str, Value]:
    """The hyperparameters of both that loggers get, of the data module where both have one."""
    merged: dict[str, Value] = {}
    for owner in (module, data_module):
        if owner is not None and owner._log_hyperparams:
            merged |= owner.__dict__["_hparams_initial"]
    return {name: value for name, value in merged.items() if name not in CLI_KEYS}


def find_collisions(module: HyperparametersMixin, data_module: HyperparametersMixin | None) -> list[str]:
    """The hyperparameters that loggers get of both, and which differ."""
    if data_module is None or not (module._log_hyperparams and data_module._log_hyperparams):
        return []
    mine, theirs = module.__dict__["_hparams_initial"], data_module.__dict__["_hparams_initial"]
    shared = [name for name in mine if name in theirs and name not in CLI_KEYS]
    return [name for name in shared if not _is_same(mine[name], theirs[name])]


def _is_same(one: Value, other: Value) -> bool:
    """By type too; tensors are the same if they are one object, since many values have no one answer."""
    if one is other:
        return True
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)


def _copied(values: AttributeDict) -> AttributeDict:
    return AttributeDict({name: _copy(value) for name, value in values.items()})


def _copy(value: Value) -> Value:
    if isinstance(value, (Tensor, nn.Module)):  # large, and not what a later change would be made to
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # an object's own way to be copied may raise anything; then the object itself is kept
        return value
