"""The optimizer and the scheduler that a command line names, as a module's `configure_optimizers`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from raylight.cli.schedulers import instantiate_class, name_class
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.user.overriding import overrides

if TYPE_CHECKING:
    from raylight.user.module import Module

AUTOMATIC = "AUTOMATIC"
Classes: TypeAlias = type | tuple[type, ...]
Added: TypeAlias = Mapping[str, tuple[Classes, str]]
"""What was added to a parser: by key the class, or several to choose from, and the argument that it is linked to."""


class ConfigureOptimizers:
    """Makes them when it is called, on each worker, from the parameters that the module has there."""

    def __init__(
        self, module: Module, configure: Callable[..., Value], optimizer: Mapping[str, Value],
        scheduler: Mapping[str, Value] | None,
    ):  # fmt: skip
        self.module, self.configure, self.optimizer, self.scheduler = module, configure, optimizer, scheduler

    def __call__(self) -> Value:
        optimizer = instantiate_class((self.module.parameters(),), self.optimizer)
        scheduler = instantiate_class(optimizer, self.scheduler) if self.scheduler else None
        return self.configure(self.module, optimizer=optimizer, lr_scheduler=scheduler)


def find_automatic(added: Added, get: Callable[[str], Value]) -> Mapping[str, Value] | None:
    """The one that is linked to nothing, as `instantiate_class` takes it; None if the command line names none."""
    keys = [key for key, (_, link_to) in added.items() if link_to == AUTOMATIC]
    if len(keys) > 1:
        raise InvalidArguments(
            f"{keys} are all {AUTOMATIC}, and a module has one of them: link each to an argument of the module "
            "(link_to=...) and write configure_optimizers"
        )
    if not keys:
        return None
    kind, init = added[keys[0]][0], get(keys[0])
    return init if isinstance(kind, tuple) else name_class(kind, init)


def replace_configure_optimizers(
    module: Module, configure: Callable[..., Value], optimizer: Mapping[str, Value],
    scheduler: Mapping[str, Value] | None,
) -> None:  # fmt: skip
    if overrides(module, "configure_optimizers"):
        warnings.warn(
            f"{type(module).__name__}.configure_optimizers is not called: the command line names the optimizer "
            f"{optimizer['class_path']}",
            stacklevel=2,
        )
    vars(module)["configure_optimizers"] = ConfigureOptimizers(module, configure, optimizer, scheduler)
