"""Typed values: hyperparameters as plain values with a note of their type, and back, without running code of a file.

What is plain stays as it is; all else becomes `{TAG: kind, ...}`. Classes and functions are written by their import
path, and reading looks that up among the names that the caller allows. Nothing is imported, no `__init__` is called.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import sys
import types
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Protocol

import numpy
import torch
from torch import Tensor

from raylight.contract.errors import RaylightError
from raylight.contract.kinds import StateDict, Value
from raylight.user.hyperparameters import AttributeDict
from raylight.worker.checkpoint.configurations import config_kind, describe_config, read_config, write_config
from raylight.worker.checkpoint.plain_values import find_tensor_mistake, is_plain_array

TAG = "__raylight__"
_ATOMS = frozenset({type(None), bool, float, complex, str, torch.dtype, torch.device, torch.Size})
_MAX_INT_BITS = 2000  # the reader of checkpoints has no opcode for longer ones
_MAX_DEPTH = 90  # the plain copy, which is one deeper for some kinds, ends at 100

Plain = Value
"""What `torch.load(weights_only=True)` reads."""


class NotStorable(RaylightError):
    """What a checkpoint cannot hold, or cannot bring back here."""


class Names(Protocol):
    """The classes and functions that may be brought back."""

    def find(self, path: str) -> Value: ...  # raises NotStorable
    def find_callable(self, path: str) -> Value: ...  # that may be called with arguments from a file


def write(value: Value, name: str) -> Plain:
    """`value` in plain types, from which `read` makes an equal one of the same type. Raises NotStorable, which says
    what is wrong with `name`, or which part of it."""
    return _write(value, name, 0)


def read(stored: Plain, names: Names) -> Value:
    """What was written. Raises NotStorable where that needs a class or function that `names` has not; the text is the
    rest of a sentence that begins with what is read."""
    kind = type(stored)
    if kind is dict:
        if TAG in stored:
            return _read_tagged(stored, names)
        return {key: read(item, names) for key, item in stored.items()}
    if kind is OrderedDict:
        return OrderedDict((key, read(item, names)) for key, item in stored.items())
    if kind in (list, tuple):
        return kind(read(item, names) for item in stored)
    return stored


def write_shell(value: Value, name: str) -> StateDict:
    """The type of what holds values under names, without them; empty for a dict. Raises NotStorable."""
    if config_kind(value) is not None:
        return _write_config_facts(value, describe_config(value))
    if type(value) in (dict, AttributeDict):
        return {} if type(value) is dict else {TAG: "attributes"}
    shell: StateDict | None = _write_record(type(value)(), name, 0) if type(value) in _NAMESPACES else None
    if is_dataclass(value) and not isinstance(value, type):
        shell = {TAG: "dataclass", "type": path_of(type(value))}
    if shell is None:
        raise NotStorable(f"{name} is {_describe(value)}")
    return shell


def read_filled(shell: StateDict, items: dict[str, Plain], names: Names) -> Value:
    """What `write_shell` was given, with other values under the names."""
    if shell.get(TAG) == "attributes":
        return AttributeDict(read(items, names))
    return read({**shell, "items": items} if shell else items, names)


# ---- writing


def _write(value: Value, where: str, depth: int) -> Plain:
    kind = type(value)
    if kind is int:
        return value if value.bit_length() <= _MAX_INT_BITS else {TAG: "int", "value": hex(value)}
    if kind in _ATOMS:
        return value
    if depth == _MAX_DEPTH:
        raise NotStorable(f"{where[:60]}... is nested more than {_MAX_DEPTH} deep, or holds itself")
    if isinstance(value, Tensor):
        if mistake := find_tensor_mistake(value):
            raise NotStorable(f"{where} {mistake}")
        return value
    if isinstance(value, bytes | bytearray) and kind in (bytes, bytearray):
        return value if value or kind is bytearray else {TAG: "bytes", "value": bytearray()}
    if isinstance(value, numpy.ndarray) and is_plain_array(value):
        return value
    for write_kind in (_write_container, _write_enum, _write_record, _write_code, _write_simple):
        stored = write_kind(value, where, depth + 1)
        if stored is not None:
            return stored
    raise NotStorable(f"{where} is {_describe(value)}")


def _write_container(value: Value, where: str, depth: int) -> Plain | None:
    kind = type(value)
    if kind in (dict, OrderedDict, Counter, AttributeDict):
        return _write_mapping(value, where, depth)
    if kind in (list, tuple):
        return kind(_write(item, f"{where}[{index}]", depth) for index, item in enumerate(value))
    if kind in (set, frozenset, deque):
        if kind is set and all(type(item) in (str, int, float, bool) for item in value):
            return set(value)
        items = [_write(item, f"{where} item {item!r}", depth) for item in value]
        return {TAG: kind.__name__, "items": items} | ({"maxlen": value.maxlen} if kind is deque else {})
    if config_kind(value) is not None:
        try:
            content, facts = write_config(value)
        except Exception as error:  # whatever resolving an interpolation leads to
            raise NotStorable(f"{where} cannot be resolved ({type(error).__name__}: {error})") from error
        return {**_write_config_facts(value, facts), "items": _write(content, where, depth)}
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return {TAG: "named tuple", "type": path_of(kind), "items": [_write(item, where, depth) for item in value]}
    if isinstance(value, dict) and hasattr(value, "default_factory"):
        factory = _write(value.default_factory, f"{where}.default_factory", depth)
        return {TAG: "defaultdict", "factory": factory, "items": _write(dict(value), where, depth)}
    return None


def _write_config_facts(config: Value, facts: StateDict) -> StateDict:
    structure = {"type": path_of(facts.pop("class"))} if "class" in facts else {}
    return {TAG: config_kind(config), **structure, **facts}


def _write_mapping(value: Mapping[Value, Value], where: str, depth: int) -> Plain:
    kind: Value = type(value)
    pairs = [(key, _write(item, f"{where}[{key!r}]", depth)) for key, item in value.items()]
    if kind is AttributeDict or TAG in value or not all(type(key) in (str, int, bool, float) for key in value):
        items = [[_write(key, f"{where} key {key!r}", depth), item] for key, item in pairs]
        return {TAG: "attributes" if kind is AttributeDict else kind.__name__, "pairs": items}
    return {TAG: "Counter", "pairs": [list(pair) for pair in pairs]} if kind is Counter else kind(pairs)


def _write_enum(value: Value, where: str, depth: int) -> Plain | None:
    if not isinstance(value, enum.Enum):
        return None
    kind = type(value)
    named = {"name": value.name} if value.name in kind.__members__ else {"value": _write(value.value, where, depth)}
    return {TAG: "enum", "type": path_of(kind), **named}


_NAMESPACES: dict[type, str] = {argparse.Namespace: "namespace", types.SimpleNamespace: "simple namespace"}


def _write_record(value: Value, where: str, depth: int) -> Plain | None:
    """What holds values under names."""
    kind = type(value)
    if kind in _NAMESPACES:
        return {TAG: _NAMESPACES[kind], "items": _write(vars(value), where, depth)}
    if not is_dataclass(value) or isinstance(value, type):
        return None
    names = [item.name for item in fields(value)]
    others = [name for name in getattr(value, "__dict__", {}) if name not in names]
    items = {name: getattr(value, name) for name in names + others if hasattr(value, name)}
    return {
        TAG: "dataclass", "type": path_of(kind),
        "items": {name: _write(item, f"{where}.{name}", depth) for name, item in items.items()},
    }  # fmt: skip


def _write_code(value: Value, where: str, depth: int) -> Plain | None:
    """Classes and functions, by name, and calls that are not made yet."""
    if type(value) is functools.partial:
        return {
            TAG: "partial",
            "function": _write(value.func, f"{where}.func", depth),
            "arguments": [_write(item, f"{where}.args[{index}]", depth) for index, item in enumerate(value.args)],
            "keywords": {name: _write(item, f"{where}[{name!r}]", depth) for name, item in value.keywords.items()},
        }
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        path = path_of(value)
        if "<" in path:  # a lambda, or made in a function: there may be another of that name
            raise NotStorable(f"{where} is {_describe(value)}, which no import finds")
        if isinstance(value, types.BuiltinFunctionType) and not isinstance(value.__self__, types.ModuleType | None):
            return _write_bound(value, path, where)
        return {TAG: "name", "path": path}
    return None


def _write_bound(value: Value, path: str, where: str) -> Plain:
    """torch's own functions are bound to a class that nobody sees."""
    if path.partition(":")[0] == "torch":
        return {TAG: "name", "path": path}
    raise NotStorable(f"{where} is the method {path}")


_PATHS: dict[type, str] = {pathlib.PurePosixPath: "posix path", pathlib.PureWindowsPath: "windows path"}
_BY_TEXT: dict[type, tuple[Callable[[Value], Value], Callable[[Value], Value]]] = {
    range: (lambda it: [it.start, it.stop, it.step], lambda it: range(*it)),
    slice: (lambda it: [it.start, it.stop, it.step], lambda it: slice(*it)),
    datetime.timedelta: (lambda it: [it.days, it.seconds, it.microseconds], lambda it: datetime.timedelta(*it)),
    datetime.date: (datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: (datetime.time.isoformat, datetime.time.fromisoformat),
    datetime.datetime: (datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    decimal.Decimal: (str, decimal.Decimal),
    fractions.Fraction: (str, fractions.Fraction),
    uuid.UUID: (str, uuid.UUID),
}
_BY_NAME = {kind.__name__: readers[1] for kind, readers in _BY_TEXT.items()}


def _write_simple(value: Value, where: str, depth: int) -> Plain | None:
    kind: Value = type(value)
    if isinstance(value, pathlib.PurePath) and kind.__module__.partition(".")[0] == "pathlib":
        tag = "path" if isinstance(value, pathlib.Path) else _PATHS[kind]
        return {TAG: tag, "value": str(value)}
    if isinstance(value, numpy.generic) and not isinstance(value.item(), numpy.generic) and kind is not numpy.void:
        item = value.item()
        if type(item) in (bool, int, float, complex, str):
            return {TAG: "number", "dtype": value.dtype.str, "value": item}
    if isinstance(value, numpy.dtype) and value.names is None and not value.hasobject:
        return {TAG: "dtype", "value": value.str}
    has_zone = getattr(value, "tzinfo", None) is not None and not isinstance(value.tzinfo, datetime.timezone)
    if kind in _BY_TEXT and not has_zone:
        return {TAG: kind.__name__, "value": _BY_TEXT[kind][0](value)}
    return None


# ---- reading


def _read_tagged(stored: StateDict, names: Names) -> Value:
    reader = _READERS.get(stored[TAG])
    if reader is not None:
        return reader(stored, names)
    if stored[TAG] in _BY_NAME:
        return _BY_NAME[stored[TAG]](stored["value"])
    raise NotStorable(f"is of the kind {stored[TAG]!r}, which a newer raylight has written")


def _read_items(stored: StateDict, names: Names) -> Value:
    return read(stored["items"], names)


def _read_pairs(kind: Callable[[Iterable[tuple[Value, Value]]], Value]) -> Callable[[StateDict, Names], Value]:
    return lambda stored, names: kind((read(key, names), read(item, names)) for key, item in stored["pairs"])


def _find_class(stored: StateDict, names: Names, kind: type | Callable[[Value], bool]) -> Value:
    found = names.find(stored["type"])
    fits = isinstance(found, type) and (issubclass(found, kind) if isinstance(kind, type) else kind(found))
    if not fits:
        raise NotStorable(f"needs the class {stored['type']}, which is something else by now")
    return found


def _read_enum(stored: StateDict, names: Names) -> Value:
    kind = _find_class(stored, names, enum.Enum)
    if "name" not in stored:
        return kind(read(stored["value"], names))  # flags that are set together
    if stored["name"] not in kind.__members__:
        raise NotStorable(f"is {stored['name']}, which {stored['type']} has not any more")
    return kind.__members__[stored["name"]]


def _read_dataclass(stored: StateDict, names: Names) -> Value:
    kind = _find_class(stored, names, is_dataclass)
    items, known = read(stored["items"], names), {item.name for item in fields(kind)}
    if missing := sorted(known - items.keys()):
        raise NotStorable(f"is a {stored['type']} that has no {', '.join(missing)} yet")
    made = object.__new__(kind)
    for name, item in items.items():
        object.__setattr__(made, name, item)
    return made


def _read_named_tuple(stored: StateDict, names: Names) -> Value:
    kind = _find_class(stored, names, tuple)
    if len(getattr(kind, "_fields", ())) != len(stored["items"]):
        raise NotStorable(f"is a {stored['type']} of {len(stored['items'])} fields, which it has not any more")
    return tuple.__new__(kind, _read_items(stored, names))


def _read_partial(stored: StateDict, names: Names) -> Value:
    function = stored["function"]
    if isinstance(function, dict) and function.get(TAG) == "name":
        target = names.find_callable(function["path"])
    else:
        target = read(function, names)
    return functools.partial(target, *read(stored["arguments"], names), **read(stored["keywords"], names))


def _read_number(stored: StateDict, names: Names) -> Value:
    return numpy.dtype(stored["dtype"]).type(stored["value"])


def _read_defaultdict(stored: StateDict, names: Names) -> Value:
    from collections import defaultdict

    return defaultdict(read(stored["factory"], names), _read_items(stored, names))


def _read_config(stored: StateDict, names: Names) -> Value:
    structure = _find_class(stored, names, is_dataclass) if "type" in stored else None
    return read_config(stored[TAG], _read_items(stored, names), structure, stored.get("flags", {}))


_READERS: dict[str, Callable[[StateDict, Names], Value]] = {
    "int": lambda stored, names: int(stored["value"], 16),
    "bytes": lambda stored, names: bytes(stored["value"]),
    "dict": _read_pairs(dict),
    "OrderedDict": _read_pairs(OrderedDict),
    "Counter": _read_pairs(lambda pairs: Counter(dict(pairs))),
    "attributes": _read_pairs(AttributeDict),
    "set": lambda stored, names: set(_read_items(stored, names)),
    "frozenset": lambda stored, names: frozenset(_read_items(stored, names)),
    "deque": lambda stored, names: deque(_read_items(stored, names), stored["maxlen"]),
    "namespace": lambda stored, names: argparse.Namespace(**_read_items(stored, names)),
    "simple namespace": lambda stored, names: types.SimpleNamespace(**_read_items(stored, names)),
    "named tuple": _read_named_tuple,
    "defaultdict": _read_defaultdict,
    "enum": _read_enum,
    "dataclass": _read_dataclass,
    "partial": _read_partial,
    "name": lambda stored, names: names.find(stored["path"]),
    "path": lambda stored, names: pathlib.Path(stored["value"]),
    "posix path": lambda stored, names: pathlib.PurePosixPath(stored["value"]),
    "windows path": lambda stored, names: pathlib.PureWindowsPath(stored["value"]),
    "number": _read_number,
    "dtype": lambda stored, names: numpy.dtype(stored["value"]),
    "DictConfig": _read_config,
    "ListConfig": _read_config,
}


# ---- names


def path_of(code: Value) -> str:
    """The import path of a class or function, as "package.module:Outer.Inner"."""
    if isinstance(code, types.BuiltinFunctionType):
        name, spaces = code.__name__, ("torch", "torch.nn.functional", "math", "builtins")
        for space in spaces:  # torch's own say that they come from elsewhere
            if getattr(sys.modules.get(space), name, None) is code:
                return f"{space}:{name}"
    return f"{code.__module__}:{code.__qualname__}"


def _describe(value: Value) -> str:
    kind = type(value)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__module__}.{value.__qualname__}"
    return f"a {kind.__qualname__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"
