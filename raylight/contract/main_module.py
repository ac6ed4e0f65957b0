"""Classes and functions of the caller's script, in processes whose `__main__` is another.

They arrive there by value. Under their names in `__main__`, plain pickle finds them too: that is how a loader worker
sends back a batch of a class of the script.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import sys
import types
from collections import ChainMap
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cloudpickle

from raylight.contract.kinds import Value

Content = tuple[Callable[..., object], tuple[object, ...]]
"""A function that a process runs, and its arguments."""

_adopted: dict[str, object] | None = None
"""None: `__main__` is the caller's own."""


def note(found: dict[str, object], obj: object) -> None:
    """Adds `obj` to `found`, by its name, if it is a class or function of `__main__`."""
    if not isinstance(obj, (type, types.FunctionType)) or obj.__module__ != "__main__":
        return
    name: str = obj.__name__
    if vars(sys.modules["__main__"]).get(name) is obj:
        found[name] = obj


def adopt(found: dict[str, object]) -> None:
    """Makes them known in `__main__` in place of those of the run before; what Python put there itself stays."""
    global _adopted
    known = vars(sys.modules["__main__"])
    for name, obj in (_adopted or {}).items():
        if known.get(name) is obj:
            del known[name]
    _adopted = {name: obj for name, obj in found.items() if name not in known}
    known.update(_adopted)


def make_context(context: BaseContext | None) -> BaseContext | None:
    """A multiprocessing context whose processes get classes of the script by value, if they could not find them.

    None: `context` (itself None for Python's default) will do, because the process is the script's own, or because its
    children are copies of it.
    """
    method = (context or multiprocessing).get_start_method()
    if _adopted is None or method == "fork":
        return None
    changed: Any = copy.copy(context if context is not None else multiprocessing.get_context(method))
    changed.Process = _ProcessByValue(changed.Process)
    return changed


class _ProcessByValue:
    """Stands in for a context's class of processes."""

    def __init__(self, kind: Callable[..., BaseProcess]):
        self.kind = kind

    def __call__(self, *, target: Callable[..., object], args: tuple[object, ...] = ()) -> BaseProcess:
        return self.kind(target=_run, args=(_ByValue((target, args)),))


class _ByValue:
    """Arrives in a process that is being started as the content itself."""

    def __init__(self, content: Content):
        self.content = content

    def __reduce__(self) -> tuple[object, ...]:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump((self.content, pickler.of_main))
        return _load, (file.getvalue(),)


class _Pickler(cloudpickle.Pickler):
    """Functions and classes by cloudpickle; queues and the memory of tensors as multiprocessing shares them."""

    dispatch_table = ChainMap(ForkingPickler._extra_reducers, cloudpickle.Pickler.dispatch_table)  # type: ignore[attr-defined]

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.of_main: dict[str, object] = {}

    def reducer_override(self, obj: object) -> Value:
        note(self.of_main, obj)
        return super().reducer_override(obj)


def _load(data: bytes) -> Content:
    content, found = pickle.loads(data)
    adopt(found)
    return content


def _run(content: Content) -> None:
    target, args = content
    target(*args)
