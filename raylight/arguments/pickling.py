"""Which part of a module, loader or callback cannot be pickled, and so cannot be sent to a worker."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from itertools import islice
from typing import Any

import cloudpickle
import numpy as np
import torch

from raylight.contract.task import Loaders

_MAX_FOUND = 5
_MAX_PARTS = 10_000  # of one container, so that a long list is no long wait


def check_picklable(module: Any, loaders: Loaders, callbacks: list[Any]) -> list[str]:
    """What cannot be sent to a worker, by its path, as in "module.reader.handle: cannot pickle '_io.TextIOWrapper'".

    Costs a walk over all objects, but copies no tensor and no array.
    """
    names = {"train": "train_dataloaders", "validate": "val_dataloaders", "data_module": "datamodule"}
    roots = [("module", module)]
    roots += [(names.get(item.name, "dataloaders"), getattr(loaders, item.name)) for item in fields(loaders)]
    roots += [(f"callbacks[{index}]", callback) for index, callback in enumerate(callbacks)]
    found: list[str] = []
    for path, root in roots:
        if _why_not(root) is not None:
            count = len(found)
            _narrow(path, root, found, set())
            if len(found) == count:  # parts that only fail together, in a circle
                found.append(_say(path, root))
    return found


def _narrow(path: str, value: Any, found: list[str], seen: set[int]) -> None:
    """Adds the deepest parts of `value`, which cannot be pickled, that cannot be pickled themselves."""
    if id(value) in seen or len(found) >= _MAX_FOUND:
        return
    seen.add(id(value))
    count = len(found)
    is_known = False
    for part_path, part in islice(_parts(path, value), _MAX_PARTS):
        if _why_not(part) is not None:
            is_known |= id(part) in seen
            _narrow(part_path, part, found, seen)
    if len(found) == count and not is_known:
        found.append(_say(path, value))


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is pickled along with `value`, with the expression that a user would write for it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{path}[{key!r}]", item
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
    elif isinstance(value, partial):
        yield from _parts(path, {"func": value.func, "args": value.args, "keywords": value.keywords})
    elif isinstance(value, types.MethodType):
        yield f"{path}.__self__", value.__self__
        yield f"{path}.__func__", value.__func__
    elif isinstance(value, types.FunctionType):
        yield from _captured(path, value)
    elif isinstance(value, type):
        for name, member in vars(value).items():
            yield f"{path}.{name}", getattr(member, "__func__", getattr(member, "fget", member))
    else:
        yield from _attributes(path, value)


def _captured(path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables that a function takes with it: those of the function around it, defaults, and globals."""
    label = f"{path} (function {function.__qualname__}): variable "
    for name, value in inspect.getclosurevars(function).nonlocals.items():
        yield label + name, value
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield label + name, function.__globals__[name]
    for value in function.__defaults__ or ():
        yield f"{path} (function {function.__qualname__}): default", value


def _attributes(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    try:
        state = value.__getstate__()  # what pickle takes, which may be less than __dict__
    except Exception:
        return  # then the object itself is what cannot be pickled
    for part in state if isinstance(state, tuple) else (state,):
        if not isinstance(part, Mapping):
            continue
        for name, item in part.items():
            if isinstance(value, torch.nn.Module) and name in ("_modules", "_parameters", "_buffers"):
                for inner, member in item.items():
                    yield f"{path}.{inner}", member
            else:
                yield f"{path}.{name}", item
    yield f"{path} (class {type(value).__qualname__})", type(value)


def _say(path: str, value: Any) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    reason = _why_not(value) or ""
    detail = "" if name in reason or not reason else f" ({reason})"
    return f"{path}: cannot pickle '{name}'{detail}; make it in setup(), on the worker, or leave it out in __getstate__"


def _why_not(value: Any) -> str | None:
    """Why `value` cannot be pickled; None: it can."""
    try:
        _Trial(_Nowhere(), protocol=5, buffer_callback=lambda _: None).dump(value)
    except RecursionError:
        return "it is nested too deeply"
    except Exception as error:
        return str(error) or type(error).__name__
    return None


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


class _Trial(cloudpickle.CloudPickler):
    """Pickles all but the bytes of tensors and arrays."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) in (torch.Tensor, torch.nn.Parameter, np.ndarray) and getattr(obj, "dtype", None) != np.object_:
            return bytes, ()
        return super().reducer_override(obj)
