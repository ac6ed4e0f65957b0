"""Where a setting such as `batch_size` is kept: module, data module, and the hyperparameters of both."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

from raylight.contract.kinds import Value
from raylight.user.data_module import DataModule
from raylight.user.module import Module


def has_attribute(name: str, module: Module, data_module: DataModule | None = None) -> bool:
    return next(_find(name, module, data_module), None) is not None


def get_attribute(name: str, module: Module, data_module: DataModule | None = None) -> Value:
    """The last one counts, as in Lightning: the data module's before the module's."""
    *_, holder = _find(name, module, data_module)
    return holder[name] if isinstance(holder, MutableMapping) else getattr(holder, name)


def set_attribute(name: str, value: Value, module: Module, data_module: DataModule | None = None) -> None:
    """Sets it wherever it is kept."""
    for holder in list(_find(name, module, data_module)):
        if isinstance(holder, MutableMapping):
            holder[name] = value
        else:
            setattr(holder, name, value)


def _find(name: str, module: Module, data_module: DataModule | None) -> Iterator[Value]:
    owners: list[Value] = [module] if data_module is None else [module, data_module]
    for owner in owners:
        if hasattr(owner, name):
            yield owner
        if name in owner.hparams:
            yield owner.hparams
