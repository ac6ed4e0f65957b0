"""Optimizers and learning rate schedulers as a command line names them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from raylight.contract.kinds import Value


class ReduceLROnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """torch's scheduler, with the name of the logged value that it follows."""

    def __init__(self, optimizer: Optimizer, monitor: str, *args: Value, **kwargs: Value) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.monitor = monitor


LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerTypeUnion: TypeAlias = LRScheduler | ReduceLROnPlateau
LRSchedulerType: TypeAlias = type[LRScheduler] | type[ReduceLROnPlateau]
OptimizerCallable = Callable[[Iterable], Optimizer]
"""The type of a module's argument that makes its optimizer from parameters; on the command line a class and its other
arguments."""
LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]
"""As OptimizerCallable, for the scheduler of an optimizer."""


def instantiate_class(args: Value | tuple[Value, ...], init: Mapping[str, Value]) -> Value:
    """An object of the class that `init` names under "class_path", made of `args` (one, or a tuple of them) and of the
    keywords under "init_args"."""
    module, _, name = init["class_path"].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return kind(*(args if isinstance(args, tuple) else (args,)), **init.get("init_args", {}))


def name_class(kind: type, arguments: Mapping[str, Value] | None) -> dict[str, Value]:
    """`kind` and its arguments as `instantiate_class` takes them."""
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dict(arguments or {})}
