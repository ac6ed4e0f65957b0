"""Finds the part of a module, loader or callback that cannot be pickled, and so cannot be sent to a worker."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import islice

import cloudpickle
import numpy as np
import torch

from raylight.contract.kinds import Value
from raylight.contract.reducers import hooks_of, reduce_special, state_of, type_of
from raylight.contract.task import Loaders

_MAX_FOUND = 5
_MAX_PARTS = 10_000  # of one container, so that a long list is no long wait
_QUICK_BYTES = 64 << 20


def check_picklable(
    module: object, loaders: Loaders, callbacks: Sequence[object], others: Mapping[str, object] | None = None
) -> list[str]:
    """The objects that cannot be sent to a worker, by path: "module.reader.handle: cannot pickle '_io.TextIOWrapper'".

    Costs a walk over all objects, but copies no tensor and no array. `others` are arguments by name. Of each object no
    more than the first 64 MB are tried: after that come the items of a long list, and sending it tries them all.
    """
    names = {"train": "train_dataloaders", "validate": "val_dataloaders", "data_module": "datamodule"}
    roots: dict[str, object] = {"module": module}
    for item in fields(loaders):
        loader = getattr(loaders, item.name)
        if loader is not None:
            roots[names.get(item.name, "dataloaders")] = loader
    roots |= {f"callbacks[{index}]": callback for index, callback in enumerate(callbacks)}
    return find_unpicklable(roots | dict(others or {}), _QUICK_BYTES)


def find_unpicklable(roots: Mapping[str, object], max_bytes: float = float("inf")) -> list[str]:
    """The same for any objects by name; `max_bytes` of each are tried."""
    search = _Search(max_bytes)
    for path, root in roots.items():
        search.look(path, root)
    return search.found


class _Search:
    def __init__(self, max_bytes: float):
        self.max_bytes = max_bytes
        self.found: list[str] = []

    def look(self, path: str, root: object) -> None:
        if self._why_not(root) is None:
            return
        count = len(self.found)
        self._narrow(path, root, set())
        if len(self.found) == count:  # parts that only fail together, in a circle
            self._add(path, root)

    def _narrow(self, path: str, value: object, seen: set[int]) -> None:
        """Adds the deepest parts of `value`, which cannot be pickled, that cannot be pickled themselves; each once,
        however many hold it."""
        seen.add(id(value))
        is_explained = False
        for part_path, part in islice(_parts(path, value), _MAX_PARTS):
            if len(self.found) >= _MAX_FOUND:
                return
            if self._why_not(part) is not None:
                is_explained = True
                if id(part) not in seen:
                    self._narrow(part_path, part, seen)
        if not is_explained:
            self._add(path, value)

    def _add(self, path: str, value: object) -> None:
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        reason = self._why_not(value) or ""
        detail = "" if name in reason or not reason else f" ({reason})"
        self.found.append(
            f"{path}: cannot pickle '{name}'{detail}; make it in setup(), on the worker, or leave it out in "
            "__getstate__"
        )

    def _why_not(self, value: object) -> str | None:
        """Why `value` cannot be pickled; None: it can."""
        try:
            _Trial(_Nowhere(self.max_bytes), protocol=5, buffer_callback=lambda _: None).dump(value)
        except _EnoughError:
            return None
        except RecursionError:
            return "it is nested too deeply"
        except Exception as error:
            return str(error) or type(error).__name__
        return None


def _parts(path: str, value: object) -> Iterator[tuple[str, object]]:
    """The objects that are pickled along with `value`, each with the expression that a user would write for it."""
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
    elif isinstance(value, torch.Tensor):
        yield f"{path} (hooks)", hooks_of(value)
        yield from _parts(path, vars(value))
    elif isinstance(value, type):
        for name, member in vars(value).items():
            yield f"{path}.{name}", getattr(member, "__func__", getattr(member, "fget", member))
    else:
        yield from _attributes(path, value)


def _captured(path: str, function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """The variables that a function takes with it: those of the function around it, defaults, and globals."""
    label = f"{path} (function {function.__qualname__}): variable "
    for name, value in inspect.getclosurevars(function).nonlocals.items():
        yield label + name, value
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield label + name, function.__globals__[name]
    for value in function.__defaults__ or ():
        yield f"{path} (function {function.__qualname__}): default", value


def _attributes(path: str, value: object) -> Iterator[tuple[str, object]]:
    try:
        state = state_of(value)
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
    kind = type_of(value)
    yield f"{path} (class {kind.__qualname__})", kind


class _EnoughError(Exception):
    """So much could be pickled that the rest is not tried."""


class _Nowhere:
    def __init__(self, max_bytes: float):
        self.left = max_bytes

    def write(self, data: bytes) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise _EnoughError
        return len(data)


class _Trial(cloudpickle.CloudPickler):
    """Pickles all but the bytes of tensors and arrays."""

    def reducer_override(self, obj: Value) -> Value:
        kind = type(obj)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            return bytes, (), (vars(obj) or None, hooks_of(obj))
        if kind is np.ndarray and obj.dtype != np.object_:
            return bytes, ()
        special = reduce_special(obj)
        return special if special is not None else super().reducer_override(obj)
