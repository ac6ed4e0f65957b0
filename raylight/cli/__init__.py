"""LightningCLI: a command line for a module, its data and the trainer, made from their signatures.

It needs jsonargparse: `pip install 'raylight[cli]'`. Each name is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raylight.cli.argument_parser import LightningArgumentParser
    from raylight.cli.lightning_cli import ArgsType, LightningCLI
    from raylight.cli.save_config_callback import SaveConfigCallback
    from raylight.cli.schedulers import (
        LRSchedulerCallable,
        LRSchedulerType,
        LRSchedulerTypeTuple,
        LRSchedulerTypeUnion,
        OptimizerCallable,
        ReduceLROnPlateau,
        instantiate_class,
    )
    from raylight.instantiation import instantiate_module

_FILES = {
    "ArgsType": "cli.lightning_cli",
    "LRSchedulerCallable": "cli.schedulers",
    "LRSchedulerType": "cli.schedulers",
    "LRSchedulerTypeTuple": "cli.schedulers",
    "LRSchedulerTypeUnion": "cli.schedulers",
    "LightningArgumentParser": "cli.argument_parser",
    "LightningCLI": "cli.lightning_cli",
    "OptimizerCallable": "cli.schedulers",
    "ReduceLROnPlateau": "cli.schedulers",
    "SaveConfigCallback": "cli.save_config_callback",
    "instantiate_class": "cli.schedulers",
    "instantiate_module": "instantiation",
}

__all__ = [
    "ArgsType",
    "LRSchedulerCallable",
    "LRSchedulerType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "LightningArgumentParser",
    "LightningCLI",
    "OptimizerCallable",
    "ReduceLROnPlateau",
    "SaveConfigCallback",
    "instantiate_class",
    "instantiate_module",
]


def __getattr__(name: str) -> object:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"raylight.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
