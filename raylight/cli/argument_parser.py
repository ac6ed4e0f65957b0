"""LightningArgumentParser: jsonargparse's parser, which also knows trainers, modules, callbacks and optimizers."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from raylight import callbacks, loggers
from raylight.cli.automatic_optimizer import AUTOMATIC, Classes
from raylight.cli.schedulers import LRSchedulerType, LRSchedulerTypeTuple
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.trainer import Trainer
from raylight.user.callback import Callback
from raylight.user.data_module import DataModule
from raylight.user.module import Module

try:
    from jsonargparse import SUPPRESS, ArgumentParser, class_from_function, set_parsing_settings
except ImportError as error:
    raise ImportError("LightningCLI needs the package jsonargparse: pip install 'raylight[cli]'") from error

set_parsing_settings(config_read_mode_fsspec_enabled=True)

WITHOUT_EFFECT = {"barebones": False, "enable_autolog_hparams": True, "model_registry": None}
"""Arguments that only Lightning's trainer has, and that its saved configurations hold, at the values that change
nothing."""
KINDS = (Trainer, Module, DataModule, Callback)


class LightningArgumentParser(ArgumentParser):
    """A parser that reads configuration files, and takes the arguments of classes from their signatures."""

    def __init__(
        self,
        *args: Value,
        description: str = "Lightning Trainer command line tool",
        env_prefix: str = "PL",
        default_env: bool = False,
        **kwargs: Value,
    ) -> None:
        super().__init__(*args, description=description, env_prefix=env_prefix, default_env=default_env, **kwargs)
        self.callback_keys: list[str] = []
        """Keys of the callbacks that were added by `add_lightning_class_args`."""
        self._optimizers: dict[str, tuple[Classes, str]] = {}
        self._lr_schedulers: dict[str, tuple[Classes, str]] = {}
        for package in (callbacks, loggers):  # a class that is imported can be given by its name alone
            for name in dir(package):
                getattr(package, name)

    def add_lightning_class_args(
        self,
        lightning_class: Callable[..., Trainer | Module | DataModule | Callback],
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """Adds the arguments of a class, or of a function that returns one of its objects, under `nested_key`; with
        `subclass_mode` the class itself is an argument, any that inherits from it. Returns the names that were
        added."""
        kind = lightning_class if isinstance(lightning_class, type) else class_from_function(lightning_class)
        if not issubclass(kind, KINDS):
            raise InvalidArguments(
                f"add_lightning_class_args takes a Trainer, Module, DataModule or Callback, as a class or a function "
                f"that returns one, not {lightning_class!r}"
            )
        if issubclass(kind, Callback):
            self.callback_keys.append(nested_key)
        if subclass_mode:
            self.add_subclass_arguments(kind, nested_key, fail_untyped=False, required=required)
            return [nested_key]
        is_made_here = not issubclass(kind, Trainer)
        added = self.add_class_arguments(
            kind, nested_key, fail_untyped=False, instantiate=is_made_here, sub_configs=True
        )
        if issubclass(kind, Trainer):
            for name in WITHOUT_EFFECT:
                if f"{nested_key}.{name}" not in added:
                    self.add_argument(f"--{nested_key}.{name}", type=object, default=SUPPRESS, help=SUPPRESS)
        return list(added)

    def add_optimizer_args(
        self,
        optimizer_class: type[Optimizer] | tuple[type[Optimizer], ...] = (Optimizer,),
        nested_key: str = "optimizer",
        link_to: str = AUTOMATIC,
    ) -> None:
        """Adds the arguments of an optimizer's class, or, for a tuple, those of any that inherits from one of these.

        With `link_to="AUTOMATIC"` it becomes the module's optimizer; else it is given to that argument.
        """
        self._add_class(optimizer_class, (Optimizer,), nested_key, {"params"})
        self._optimizers[nested_key] = (optimizer_class, link_to)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: LRSchedulerType | tuple[LRSchedulerType, ...] = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = AUTOMATIC,
    ) -> None:
        """As `add_optimizer_args`, for a learning rate scheduler."""
        self._add_class(lr_scheduler_class, LRSchedulerTypeTuple, nested_key, {"optimizer"})
        self._lr_schedulers[nested_key] = (lr_scheduler_class, link_to)

    def _add_class(self, given: Classes, allowed: tuple[type, ...], nested_key: str, skip: set[str]) -> None:
        for kind in given if isinstance(given, tuple) else (given,):
            if not (isinstance(kind, type) and issubclass(kind, allowed)):
                names = " or ".join(f"{one.__module__}.{one.__name__}" for one in allowed)
                raise InvalidArguments(f"{nested_key}: {kind!r} does not inherit from {names}")
        if isinstance(given, tuple):
            self.add_subclass_arguments(given, nested_key, fail_untyped=False, instantiate=False, skip=skip)
        else:
            self.add_class_arguments(
                given, nested_key, fail_untyped=False, instantiate=False, sub_configs=True, skip=skip
            )
