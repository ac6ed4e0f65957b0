"""LightningCLI: parse a configuration, make what it names, and call the trainer."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable
from typing import TypeAlias

from docstring_parser import parse
from jsonargparse import ActionConfigFile, Namespace, class_from_function
from torch.optim import Optimizer

from raylight import __version__
from raylight.arguments.rules import as_list
from raylight.cli.argument_parser import WITHOUT_EFFECT, LightningArgumentParser
from raylight.cli.automatic_optimizer import AUTOMATIC, Classes, find_automatic, replace_configure_optimizers
from raylight.cli.checkpoint_support import Instantiator, read_arguments
from raylight.cli.save_config_callback import SaveConfigCallback
from raylight.cli.schedulers import LRSchedulerTypeTuple, LRSchedulerTypeUnion, ReduceLROnPlateau, name_class
from raylight.contract.kinds import Value
from raylight.contract.seeding import seed_everything
from raylight.trainer import Trainer
from raylight.user.callback import Callback
from raylight.user.data_module import DataModule
from raylight.user.module import Module

ArgsType: TypeAlias = list[str] | dict[str, Value] | Namespace | None
"""What a LightningCLI can be given instead of the command line."""


class LightningCLI:
    """The command line of a script: `fit`, `validate`, `test` and `predict` with the arguments of module, data module
    and trainer, from options and from configuration files.

    `model_class` and `datamodule_class` are classes or functions that return an object; None lets the command line
    name any class, as `subclass_mode_model` and `subclass_mode_data` do for those that inherit from the given one.
    `trainer_defaults` are arguments of the trainer; callbacks among them are always there. `seed_everything_default`
    is a seed, or False for none. `parser_kwargs` are arguments of the parser, or under a subcommand's name of its own.
    `args` stands for the command line: a list of words, a dict or a Namespace. With `run=False` there are no
    subcommands, and nothing is run: use `cli.trainer`, `cli.model` and `cli.datamodule`.
    `auto_configure_optimizers=False` adds no options for optimizer and scheduler.
    `load_from_checkpoint_support=False` leaves what `save_hyperparameters` keeps to `__init__` alone.
    """

    def __init__(
        self,
        model_class: type[Module] | Callable[..., Module] | None = None,
        datamodule_class: type[DataModule] | Callable[..., DataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Value] | None = None,
        trainer_class: type[Trainer] | Callable[..., Trainer] = Trainer,
        trainer_defaults: dict[str, Value] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Value] | None = None,
        parser_class: type[LightningArgumentParser] = LightningArgumentParser,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: ArgsType = None,
        run: bool = True,
        auto_configure_optimizers: bool = True,
        load_from_checkpoint_support: bool = True,
    ) -> None:
        self.model_class, self.datamodule_class = model_class, datamodule_class
        self._model_class = model_class or Module
        self._datamodule_class = datamodule_class or DataModule
        self.subclass_mode_model = model_class is None or subclass_mode_model
        self.subclass_mode_data = datamodule_class is None or subclass_mode_data
        self.save_config_callback, self.save_config_kwargs = save_config_callback, save_config_kwargs or {}
        self.trainer_class, self.trainer_defaults = trainer_class, trainer_defaults or {}
        self.seed_everything_default = seed_everything_default
        self.parser_class, self.parser_kwargs = parser_class, parser_kwargs or {}
        self.auto_configure_optimizers = auto_configure_optimizers
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        self._method_arguments: dict[str, list[str]] = {}

        names = self.subcommands()
        own = {key: value for key, value in self.parser_kwargs.items() if key in names}
        self.setup_parser(run, {key: value for key, value in self.parser_kwargs.items() if key not in own}, own)
        self.parse_arguments(self.parser, args)
        self.subcommand: str | None = self.config["subcommand"] if run else None
        self._take_arguments_of_checkpoint()
        self._set_seed()
        self._instantiators = self._make_instantiators() if load_from_checkpoint_support else []
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()
        if self.subcommand is not None:
            self._run_subcommand(self.subcommand)

    # ---- the parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, which are methods of the trainer, and their parameters that are no options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
            "predict": {"model", "dataloaders", "datamodule"},
        }

    def init_parser(self, **kwargs: Value) -> LightningArgumentParser:
        """Makes a parser that takes `--config`; `kwargs` are its arguments."""
        parser = self.parser_class(**{"dump_header": [f"raylight=={__version__}"], **kwargs})
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
        )
        return parser

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Value], subparser_kwargs: dict[str, Value]
    ) -> None:
        """Makes the parser, and with `add_subcommands` one for each of those."""
        self.parser = self.init_parser(**main_kwargs)
        if not add_subcommands:
            self._add_arguments(self.parser)
            return
        parsers = self.parser.add_subcommands()
        kind = self.trainer_class if isinstance(self.trainer_class, type) else class_from_function(self.trainer_class)
        for name, skip in self.subcommands().items():
            help_text = _read_summary(getattr(kind, name))
            parser = self.init_parser(**{"description": help_text, **subparser_kwargs.get(name, {})})
            self._add_arguments(parser)
            self._method_arguments[name] = parser.add_method_arguments(kind, name, skip=set(skip))
            self._subcommand_parsers[name] = parser
            parsers.add_subcommand(name, parser, help=help_text)

    def _add_arguments(self, parser: LightningArgumentParser) -> None:
        self.add_default_arguments_to_parser(parser)
        self.add_core_arguments_to_parser(parser)
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers:
            if not parser._optimizers:
                parser.add_optimizer_args((Optimizer,))
            if not parser._lr_schedulers:
                parser.add_lr_scheduler_args(LRSchedulerTypeTuple)
        self.link_optimizers_and_lr_schedulers(parser)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--seed_everything`."""
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=self.seed_everything_default,
            help="Seed for seed_everything, called before anything is made. True: PL_GLOBAL_SEED of the environment, "
            "else 0. False: none.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the arguments of trainer, module and data module."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        defaults = {f"trainer.{name}": value for name, value in self.trainer_defaults.items() if name != "callbacks"}
        parser.set_defaults(defaults)
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=self.subclass_mode_model)
        parser.add_lightning_class_args(
            self._datamodule_class,
            "data",
            subclass_mode=self.subclass_mode_data,
            required=self.datamodule_class is not None,  # without one the module may have loaders
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Override it to add arguments, or to link some with `parser.link_arguments`."""

    @staticmethod
    def link_optimizers_and_lr_schedulers(parser: LightningArgumentParser) -> None:
        """Links the optimizers and schedulers that were added with a `link_to` to that argument."""
        for key, (kind, link_to) in {**parser._optimizers, **parser._lr_schedulers}.items():
            if link_to != AUTOMATIC:
                parser.link_arguments(key, link_to, compute_fn=_make_namer(kind))

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Reads `args`, or the command line, into `self.config`."""
        if args is not None and len(sys.argv) > 1:
            warnings.warn(
                f"LightningCLI takes args={args!r}; the command line's {sys.argv[1:]} are not read", stacklevel=3
            )
        if isinstance(args, dict | Namespace):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    def _take_arguments_of_checkpoint(self) -> None:
        """The model of a checkpoint that the subcommand reads has the arguments that it was trained with."""
        if self.subcommand is None or not (path := self.config[self.subcommand].get("ckpt_path")):
            return
        if found := read_arguments(path, _find_kind(self._model_class)):
            self.config = self.parser.parse_object({self.subcommand: {"model": found}}, self.config)

    def _parser(self, subcommand: str | None) -> LightningArgumentParser:
        return self.parser if subcommand is None else self._subcommand_parsers[subcommand]

    def _get(self, config: Namespace, key: str, default: Value = None) -> Value:
        """A value of the configuration, which may lie below the subcommand."""
        return config.get(str(self.subcommand), config).get(key, default)

    # ---- making what the configuration names

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is False:
            return
        chosen = seed_everything(None if seed is True else seed, workers=True)
        (self.config if self.subcommand is None else self.config[self.subcommand])["seed_everything"] = chosen

    def _make_instantiators(self) -> list[tuple[Instantiator, type, bool]]:
        """Those of module and data module, so that `save_hyperparameters` keeps their configuration."""
        given = {
            "model": (self._model_class, self.subclass_mode_model),
            "data": (self._datamodule_class, self.subclass_mode_data),
        }
        return [(Instantiator(self._dump, key), _find_kind(one), is_any) for key, (one, is_any) in given.items()]

    def _dump(self, key: str) -> Value:
        """A part of the configuration as plain values, linked ones included."""
        dumped = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False, format="json")
        whole = json.loads(dumped)
        return (whole if self.subcommand is None else whole[self.subcommand]).get(key, {})

    def before_instantiate_classes(self) -> None:
        """Override it to do something once the configuration is read."""

    def instantiate_classes(self) -> None:
        """Makes data module, module and trainer."""
        self.config_init = self.parser.instantiate(self.config, instantiators=self._instantiators)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self._add_configure_optimizers_method_to_model(self.subcommand)
        self.trainer = self.instantiate_trainer()

    def after_instantiate_classes(self) -> None:
        """Override it to do something before the subcommand runs."""

    def instantiate_trainer(self, **kwargs: Value) -> Trainer:
        """Makes the trainer; `kwargs` come before what the configuration says."""
        added = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        return self._instantiate_trainer({**self._get(self.config_init, "trainer", {}), **kwargs}, added)

    def _instantiate_trainer(self, config: dict[str, Value], callbacks: list[Callback]) -> Trainer:
        config = {key: value for key, value in config.items() if WITHOUT_EFFECT.get(key, ...) != value}
        if "callbacks" not in config:
            warnings.warn(
                f"{self.trainer_class.__qualname__} takes no callbacks, so LightningCLI adds none", stacklevel=2
            )
            return self.trainer_class(**config)
        always = self.trainer_defaults.get("callbacks")
        config["callbacks"] = [*as_list(config["callbacks"]), *callbacks, *as_list(always)]
        if self.save_config_callback is not None and not config.get("fast_dev_run"):
            parser, parsed = self._parser(self.subcommand), self.config.get(str(self.subcommand), self.config)
            config["callbacks"].append(self.save_config_callback(parser, parsed, **self.save_config_kwargs))
        return self.trainer_class(**config)

    @staticmethod
    def configure_optimizers(
        lightning_module: Module, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Value:
        """What the module's `configure_optimizers` returns if the command line names an optimizer; override it."""
        if lr_scheduler is None:
            return optimizer
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            scheduler = {"scheduler": lr_scheduler, "monitor": lr_scheduler.monitor}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        return [optimizer], [lr_scheduler]

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Lets the module have the optimizer and the scheduler of the command line."""
        if not self.auto_configure_optimizers:
            return
        parser = self._parser(subcommand)
        optimizer = find_automatic(parser._optimizers, self._get_made)
        scheduler = find_automatic(parser._lr_schedulers, self._get_made)
        if optimizer:
            replace_configure_optimizers(self.model, self.configure_optimizers, optimizer, scheduler)

    def _get_made(self, key: str) -> Value:
        return self._get(self.config_init, key)

    # ---- running

    def _run_subcommand(self, subcommand: str) -> None:
        self._call_if_there(f"before_{subcommand}")
        run = getattr(self, subcommand, None) or getattr(self.trainer, subcommand)
        run(**self._prepare_subcommand_kwargs(subcommand))
        self._call_if_there(f"after_{subcommand}")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Value]:
        """The arguments of the trainer's method."""
        given = self.config_init[subcommand].items()
        kwargs = {key: value for key, value in given if key in self._method_arguments[subcommand]}
        kwargs["model"] = self.model
        if self.datamodule is not None:
            kwargs["datamodule"] = self.datamodule
        return kwargs

    def _call_if_there(self, name: str) -> None:
        hook = getattr(self, name, None)
        if callable(hook):
            hook()


def _make_namer(kind: Classes) -> Callable[[Value], Value] | None:
    """For a link to an argument that takes a class and its arguments: of one class the latter alone are parsed."""
    return None if isinstance(kind, tuple) else lambda arguments: name_class(kind, arguments)


def _find_kind(given: Callable[..., Value]) -> type:
    """The class, or that of the objects which a function returns."""
    if isinstance(given, type):
        return given
    kind: type = inspect.signature(given, eval_str=True).return_annotation
    return kind


def _read_summary(method: Callable[..., Value]) -> str | None:
    return parse(method.__doc__ or "").short_description
