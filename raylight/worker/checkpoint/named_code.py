"""Named code: the classes and functions that the code of a module class names itself.

A checkpoint may name code that its reader has not chosen. So what it names is looked up here, and never imported:
either the reader's own class names it too, or it belongs to a short list of torch's and Python's that are harmless
with any arguments.
"""

from __future__ import annotations

import builtins
import enum
import inspect
import math
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache, partial

import torch

from raylight.contract.kinds import StateDict, Value
from raylight.worker.checkpoint.typed_values import NotStorable, path_of

_NOT_OWN = ("builtins", "torch", "raylight")
_STANDARD = sys.stdlib_module_names
_BUILTINS = (
    "int", "float", "str", "bool", "complex", "bytes", "list", "dict", "tuple", "set", "frozenset",
    "abs", "min", "max", "sum", "len", "round", "sorted",
)  # fmt: skip
_OF_TORCH = (
    "abs", "celu", "cos", "erf", "exp", "log", "log1p", "log_softmax", "logit", "max", "mean", "min", "prelu", "relu",
    "rrelu", "selu", "sigmoid", "sin", "softmax", "sqrt", "square", "sum", "tanh",
)  # fmt: skip
_MAX_MODULE_DEPTH = 4  # as in torch.optim.lr_scheduler.StepLR

Code = type | types.FunctionType | types.BuiltinFunctionType


class NamedCode:
    """What the code of `owner` names: in the files of its class and of those it inherits from, what is defined there
    or imported by name (`from x import A`); in their methods, what is written out (`x.A`); defaults and annotations of
    `__init__`, and of the dataclasses among these. Nothing of the standard library."""

    def __init__(self, owner: type):
        self._found: StateDict = {}
        self._own_globals: set[int] = set()
        for kind in owner.__mro__:
            if kind.__module__.partition(".")[0] not in _NOT_OWN:
                self._read_class(kind)

    def find(self, path: str) -> Value:
        """The class or function of that path. Raises NotStorable where nothing names it. What was trained by a script
        is found in a module, and the other way round."""
        if path in _harmless():
            return _harmless()[path]
        module, _, name = path.partition(":")
        for key, code in self._found.items():
            there, _, its_name = key.partition(":")
            if its_name == name and (there == module or "__main__" in (there, module)):
                return code
        raise NotStorable(f"needs {path.replace(':', '.')}, which the module's own code does not name")

    def find_callable(self, path: str) -> Value:
        """Classes, and functions of the person's own: another's, called with what a file says, could do anything."""
        code = self.find(path)
        is_own = id(getattr(code, "__globals__", None)) in self._own_globals
        if isinstance(code, type) or is_own or path in _harmless():
            return code
        raise NotStorable(f"calls the function {path.replace(':', '.')} of another package with arguments of a file")

    # ---- looking

    def _read_class(self, kind: type) -> None:
        functions = list(_functions(kind))
        spaces = [function.__globals__ for function in functions]
        module = sys.modules.get(kind.__module__)
        spaces += [vars(module)] if module is not None else []
        spaces = list({id(space): space for space in spaces}.values())
        self._own_globals |= {id(space) for space in spaces}
        words = {word for function in functions for word in _words(function.__code__)}
        for space in spaces:
            for name, value in list(space.items()):
                if isinstance(value, types.ModuleType):
                    if name in words:
                        self._read_module(value, words, _MAX_MODULE_DEPTH)
                else:
                    self._add(value)
        for function in functions:
            for cell in function.__closure__ or ():
                self._add_cell(cell)
            if function.__name__ == "__init__":
                self._read_signature(function)

    def _add_cell(self, cell: Value) -> None:
        try:
            self._add(cell.cell_contents)
        except ValueError:  # not assigned yet
            return

    def _read_module(self, module: types.ModuleType, words: set[str], depth: int) -> None:
        for word in words & vars(module).keys():
            value = vars(module)[word]
            if not isinstance(value, types.ModuleType):
                self._add(value)
            elif depth > 1:
                self._read_module(value, words, depth - 1)

    def _read_signature(self, function: Value) -> None:
        for parameter in inspect.signature(function).parameters.values():
            default = parameter.default
            self._add(default.func if isinstance(default, partial) else default)
            if isinstance(default, enum.Enum) or (is_dataclass(default) and not isinstance(default, type)):
                self._add(type(default))
        self._read_annotations(function)

    def _read_annotations(self, owner: Value) -> None:
        try:
            hints = typing.get_type_hints(owner)
        except Exception:  # names that exist for a type checker alone
            hints = {name: hint for name, hint in owner.__annotations__.items() if not isinstance(hint, str)}
        for hint in hints.values():
            for part in _parts(hint):
                self._add(part)

    def _add(self, value: Value) -> None:
        if not isinstance(value, Code) or value.__module__ is None or "<lambda>" in value.__qualname__:
            return
        path = path_of(value)
        if path.partition(":")[0].partition(".")[0] in _STANDARD or path in self._found:
            return
        self._found[path] = value
        if isinstance(value, type):
            for inner in list(vars(value).values()):
                if isinstance(inner, type) and inner.__qualname__.startswith(f"{value.__qualname__}."):
                    self._add(inner)
            if is_dataclass(value):
                self._read_annotations(value)


def _functions(kind: type) -> Iterator[types.FunctionType]:
    """The methods of a class, and what properties and decorators are made of."""
    for member in list(vars(kind).values()):
        member = getattr(member, "__func__", getattr(member, "fget", member))
        member = inspect.unwrap(member) if callable(member) else member
        if isinstance(member, types.FunctionType):
            yield member


def _words(code: types.CodeType) -> Iterator[str]:
    """The names that stand in it, those of functions in it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)


def _parts(hint: Value) -> Iterator[Value]:
    """`A` and `B` of `A | list[B]`."""
    yield hint
    for argument in typing.get_args(hint):
        yield from _parts(argument)


@cache
def _harmless() -> StateDict:
    """By path: what can be made or called with any arguments, and computes."""
    nn, optim = torch.nn, torch.optim
    kinds = (nn.Module, optim.Optimizer, optim.lr_scheduler.LRScheduler)
    spaces = (nn, optim, optim.lr_scheduler)
    found: list[Value] = []
    for space in spaces:
        found += [value for value in vars(space).values() if isinstance(value, type) and issubclass(value, kinds)]
    for space in (nn.functional, nn.init):
        found += [value for name, value in vars(space).items() if _is_public_function(name, value, space)]
    found += [getattr(torch, name) for name in _OF_TORCH] + [getattr(builtins, name) for name in _BUILTINS]
    found += [value for value in vars(math).values() if isinstance(value, types.BuiltinFunctionType)]
    return {path: value for value in found if "<" not in (path := path_of(value))}


def _is_public_function(name: str, value: Value, space: types.ModuleType) -> bool:
    if name.startswith("_"):
        return False
    if isinstance(value, types.BuiltinFunctionType):
        return path_of(value) == f"{space.__name__}:{name}"
    return isinstance(value, types.FunctionType) and value.__module__ == space.__name__
