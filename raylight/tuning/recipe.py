"""Recipe: how a configuration of the search space becomes a module, its data and the trainer's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from raylight.arguments.rules import RULES
from raylight.contract.errors import InvalidArguments
from raylight.contract.task import Loaders
from raylight.user.data_module import DataModule
from raylight.user.module import Module

LIGHTNINGS_SCALE = ("devices", "gpus", "num_nodes", "accelerator")
SCALE_ARGUMENTS = ("num_workers", "use_gpu", "resources_per_worker", "strategy", *LIGHTNINGS_SCALE)
"""They say how much room a trial takes. Tune asks for it before anything of the trial exists."""
PLACE_ARGUMENTS = ("storage_path", "default_root_dir", "storage_filesystem", "name")
"""They say which run it is, one for all trials."""
TRAINER_KEYS = tuple(name for name in RULES if name not in PLACE_ARGUMENTS)

Config = Mapping[str, object]
Arguments = dict[str, Any]
"""The trainer's arguments as a person wrote them, not resolved yet."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The types of what a function of the configuration returned, and of the data, wherever they came from. Unknown,
    they are what most have."""

    returned: tuple[type, ...] = (Module, tuple, dict)
    data: type = tuple

    @property
    def is_several_loaders(self) -> bool:
        return issubclass(self.data, tuple | list)


@dataclass(slots=True)
class Made:
    """The arguments of `raylight.fit` for one configuration."""

    module: Any
    loaders: Loaders
    arguments: Arguments
    shape: Shape

    def take_arguments(self, arguments: Mapping[str, object]) -> None:
        """These take the place of those of the same names."""
        self.arguments = {**self.arguments, **arguments}


@dataclass(frozen=True, slots=True)
class Recipe:
    """`target` is a module class, whose arguments the space fills, or a function that returns module, data and trainer
    arguments. Keys that the trainer or a data module class takes go there; a function as `data` gets all of them."""

    target: Callable[..., Any]
    data: object = None
    arguments: Arguments = field(default_factory=dict)

    @property
    def name(self) -> str:
        return getattr(self.target, "__name__", type(self.target).__name__)

    @property
    def is_class(self) -> bool:
        return isinstance(self.target, type)

    def make(self, config: Config) -> Made:
        if self.is_class:
            module, data = self.target(**self.module_arguments(config)), self._make_data(config)
            arguments = self.arguments | self.trainer_arguments(config)
            return Made(module, as_loaders(data), arguments, Shape(data=type(data)))
        returned = self._call(config)
        module, data, arguments = (*returned, None, None)[:3]
        data = data if data is not None else self._make_data(config)
        shape = Shape(tuple(map(type, returned)), type(data))
        return Made(module, as_loaders(data), self.arguments | (arguments or {}), shape)

    # ---- who takes which key

    def module_arguments(self, config: Config) -> dict[str, object]:
        """The keys that `__init__` takes by name; one with **kwargs takes what nobody else does, too."""
        if not self.is_class:
            return {}
        parameters = inspect.signature(self.target).parameters
        has_own = getattr(self.target, "__init__", None) is not Module.__init__
        takes_all = has_own and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return {
            key: value for key, value in config.items()
            if key in parameters or (takes_all and not self._is_taken_elsewhere(key))
        }  # fmt: skip

    def trainer_arguments(self, config: Config) -> Arguments:
        return {key: value for key, value in config.items() if self.is_class and key in TRAINER_KEYS}

    def data_arguments(self, config: Config) -> dict[str, object]:
        """Of a DataModule class."""
        return {key: value for key, value in config.items() if self._data_class_takes(key)}

    def find_untaken(self, config: Config) -> list[str]:
        """Keys that nothing takes. A function of the configuration may take any."""
        if not self.is_class or is_function_of_config(self.data):
            return []
        module_takes = self.module_arguments(config)
        return [key for key in config if key not in module_takes and not self._is_taken_elsewhere(key)]

    def find_missing(self, config: Config) -> list[str]:
        """Arguments that the module class needs and does not get."""
        parameters = inspect.signature(self.target).parameters if self.is_class else {}
        return [
            name for name, p in parameters.items()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in config
        ]  # fmt: skip

    def known_keys(self) -> list[str]:
        """All keys that something takes, for the text of an error."""
        own = [name for name in inspect.signature(self.target).parameters if self.is_class]
        return [*own, *self._data_class_parameters(), *TRAINER_KEYS]

    def _is_taken_elsewhere(self, key: str) -> bool:
        return key in TRAINER_KEYS or self._data_class_takes(key)

    def _data_class_takes(self, key: str) -> bool:
        return key in self._data_class_parameters()

    def _data_class_parameters(self) -> list[str]:
        if not (isinstance(self.data, type) and issubclass(self.data, DataModule)):
            return []
        return list(inspect.signature(self.data).parameters)

    # ---- making

    def _make_data(self, config: Config) -> object:
        if isinstance(self.data, type):
            return self.data(**self.data_arguments(config))
        return self.data(dict(config)) if is_function_of_config(self.data) else self.data

    def _call(self, config: Config) -> tuple[Any, ...]:
        returned = self.target(dict(config))
        parts = returned if isinstance(returned, tuple) else (returned,)
        arguments = parts[2] if len(parts) == 3 and parts[2] is not None else {}
        misplaced = [name for name in arguments if name in SCALE_ARGUMENTS + PLACE_ARGUMENTS]
        if len(parts) > 3 or misplaced:
            what = f"{', '.join(misplaced)}: pass these to raylight.sweep" if misplaced else f"{len(parts)} values"
            raise InvalidArguments(f"{self.name} returned {what}; it returns (module, data, trainer arguments)")
        return parts


def is_function_of_config(data: object) -> TypeGuard[Callable[[dict[str, object]], object]]:
    return callable(data) and not isinstance(data, (type, DataModule)) and not hasattr(data, "__iter__")


def as_loaders(data: object) -> Loaders:
    """`data` as `raylight.fit` takes it: a data module, a train loader, or (train, validate) loaders."""
    if data is None:
        return Loaders()
    if isinstance(data, DataModule) or hasattr(data, "train_dataloader"):
        return Loaders(data_module=data)
    if isinstance(data, (tuple, list)):
        return Loaders(**dict(zip(("train", "validate"), data, strict=False)))
    return Loaders(train=data)
