"""Hyperparameters and hooks by name, under the names of Lightning's parsing helpers."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator, MutableMapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from raylight.contract.rank_zero import rank_zero_warn
from raylight.user.overriding import overrides

if TYPE_CHECKING:
    from raylight.contract.kinds import Value
    from raylight.user.module import Module


def is_overridden(method_name: str, instance: object | None = None, parent: type | None = None) -> bool:
    """Whether the object has a method of its own in place of `parent`'s, by default raylight's."""
    if instance is None:
        return False
    if parent is None:
        return overrides(instance, method_name)
    own, inherited = getattr(type(instance), method_name, None), getattr(parent, method_name, None)
    if inherited is None:
        raise ValueError(f"{parent.__qualname__} has no method {method_name!r}")
    return getattr(instance, method_name) is not None and own is not inherited


def is_picklable(obj: object) -> bool:
    """Whether pickle takes the object."""
    try:
        pickle.dumps(obj)
    except (pickle.PickleError, AttributeError, RuntimeError, TypeError):
        return False
    return True


def clean_namespace(hparams: MutableMapping[str, Value]) -> None:
    """Takes out the values that cannot be pickled, and names them in a warning."""
    for name in [name for name, value in hparams.items() if not is_picklable(value)]:
        rank_zero_warn(f"{name!r} cannot be pickled and is left out of the hyperparameters")
        del hparams[name]


def save_hyperparameters(
    obj: Module, *args: object, ignore: Sequence[str] | str | None = None, frame: FrameType | None = None
) -> None:
    """`obj.save_hyperparameters(...)`, for the `__init__` that calls this."""
    current = inspect.currentframe()
    names = ignore if isinstance(ignore, str) or ignore is None else list(ignore)
    obj.save_hyperparameters(*args, ignore=names, frame=frame or (current.f_back if current else None))


def lightning_hasattr(model: Module, attribute: str) -> bool:
    """Whether the module, its hyperparameters or its data module have the attribute."""
    return next(_holders(model, attribute), None) is not None


def lightning_getattr(model: Module, attribute: str) -> Value:
    """The attribute of the module, its hyperparameters or its data module; raises AttributeError."""
    return getattr(_find_last(model, attribute), attribute)


def lightning_setattr(model: Module, attribute: str, value: Value) -> None:
    """Sets the attribute wherever it is: on the module, in its hyperparameters, on its data module."""
    _find_last(model, attribute)
    for holder in _holders(model, attribute):
        setattr(holder, attribute, value)


def _find_last(model: Module, attribute: str) -> Value:
    holders = list(_holders(model, attribute))
    if not holders:
        raise AttributeError(
            f"neither {type(model).__name__} nor its hyperparameters or data module have {attribute!r}"
        )
    return holders[-1]


def _holders(model: Module, attribute: str) -> Iterator[Value]:
    if hasattr(model, attribute):
        yield model
    if attribute in model.hparams:
        yield model.hparams
    trainer = model.__dict__.get("_trainer")
    data_module = trainer.datamodule if trainer is not None else None
    if data_module is not None:
        if hasattr(data_module, attribute):
            yield data_module
        if attribute in getattr(data_module, "hparams", {}):
            yield data_module.hparams
