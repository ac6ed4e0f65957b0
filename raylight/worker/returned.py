"""What the caller's own objects become after training in another process: what those of rank 0 were at the end."""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections.abc import Callable, Collection, Mapping

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raylight.contract.kinds import Value
from raylight.user.callback import Callback
from raylight.user.data_module import DataModule
from raylight.user.module import Module
from raylight.user.trainer_names import TrainerNames

MAX_BYTES = 256 << 20
"""Of one attribute of a data module; what its `setup` has made of larger ones is made again faster than sent."""

_DATA = (Dataset, DataLoader, Tensor, numpy.ndarray)
_MODULE_INTERNALS = {*vars(torch.nn.Module()), "_trainer", "_modes", "_toggled", "configure_optimizers"}
"""The last is an object's own, which refers to it: a command line's."""


def pack_objects(
    module: Module, callbacks: list[Callback], data_module: DataModule | None, trainer: TrainerNames,
    shipped: Mapping[str, Value], notice: Callable[[str], None],
) -> bytes:  # fmt: skip
    """The attributes that can be sent. `shipped`: those of the data module as they arrived; data among them, which the
    caller has, stays here. What is too large is named to `notice`."""
    data: dict[str, Value] = {}
    for name, value in getattr(data_module, "__dict__", {}).items():
        if name == "trainer" or (isinstance(value, _DATA) and value is shipped.get(name)):
            continue
        size = measure(value)
        if size is not None and size > MAX_BYTES:
            notice(
                f"{type(data_module).__name__}.{name} ({size / 1e6:.0f} MB) is not sent back after training; "
                "setup('fit') makes it in this process"
            )
        elif size is not None:
            data[name] = value
    content = {
        "module": _sendable(module, _MODULE_INTERNALS),
        "callbacks": [_sendable(callback) for callback in callbacks],
        "data_module": data,
        "trainer": _sendable(trainer, trainer._stays),
    }
    file = io.BytesIO()
    Packer(file).dump(content)
    return file.getvalue()


def unpack_objects(
    packed: bytes, module: Module, callbacks: list[Callback], data_module: DataModule | None, trainer: TrainerNames
) -> None:
    """Raises where a class cannot be found here."""
    content = pickle.loads(packed)
    vars(module).update(content["module"])
    vars(trainer).update(content["trainer"])
    for callback, attributes in zip(callbacks, content["callbacks"], strict=False):
        vars(callback).update(attributes)
    if content["data_module"]:
        vars(data_module).update(content["data_module"])


def measure(value: Value) -> int | None:
    """The bytes that `value` takes when it is sent; None where it cannot be sent. No tensor is copied."""
    counter = _Counter()
    try:
        counter.dump(value)
    except Exception:  # an object's own way to be pickled may raise anything
        return None
    return counter.size


def _sendable(owner: Value, skip: Collection[str] = ()) -> dict[str, Value]:
    return {
        name: value for name, value in vars(owner).items()
        if name not in skip and not isinstance(value, torch.nn.Module) and measure(value) is not None
    }  # fmt: skip


class Packer(pickle.Pickler):
    """Classes and functions go by name, those of a script too: the caller has them, and they must stay the same."""

    def reducer_override(self, obj: Value) -> Value:
        if isinstance(obj, Tensor) and obj.device.type != "cpu":
            return obj.detach().cpu().__reduce_ex__(5)
        if isinstance(obj, type | types.FunctionType) and not _is_found_here(obj):
            if "<" in obj.__qualname__:
                raise pickle.PicklingError(f"{obj.__qualname__} is found by no name")
            return _find, (obj.__module__, obj.__qualname__)
        return NotImplemented


class _Counter(Packer):
    def __init__(self) -> None:
        super().__init__(self, protocol=5)
        self.size = 0

    def write(self, data: bytes) -> None:
        self.size += len(data)

    def reducer_override(self, obj: Value) -> Value:
        if isinstance(obj, Tensor) and type(obj) in (Tensor, torch.nn.Parameter):
            self.size += obj.nbytes
            return bytes, ()
        if type(obj) is numpy.ndarray and not obj.dtype.hasobject:
            self.size += obj.nbytes
            return bytes, ()
        return super().reducer_override(obj)


def _is_found_here(obj: Value) -> bool:
    try:
        return _find(obj.__module__, obj.__qualname__) is obj
    except (KeyError, AttributeError):
        return False


def _find(module: str, name: str) -> Value:
    found: Value = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found
