"""The arguments that a running `__init__` was called with, and which of them are hyperparameters."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import FrameType, SimpleNamespace
from typing import Any

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value

Argument = tuple[str, Any, tuple[str, ...]]
"""The name of an argument, what it was, and the names of the values in it."""


def collect_arguments(owner: object, frame: FrameType | None) -> dict[str, Value]:
    """The arguments of all `__init__`s of `owner` that are running; the outermost class overrides the others. An
    `__init__` that another method called, or that has a decorator, is found too."""
    found: dict[str, Value] = {}
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            values = inspect.getargvalues(frame)
            if values.args and values.locals.get(values.args[0]) is owner:
                found |= {name: values.locals[name] for name in values.args[1:] if name in values.locals}
                found |= values.locals.get(values.keywords, {}) if values.keywords else {}
        frame = frame.f_back
    return found


def choose_hyperparameters(
    chosen: tuple[object, ...], arguments: dict[str, Value]
) -> tuple[dict[str, Value], Argument | None]:
    """All arguments, the arguments named in `chosen`, or the items of one object. For an object also the argument that
    is rebuilt from them as a whole, or None if it was not an argument."""
    objects = [one for one in chosen if not isinstance(one, str)]
    if not chosen:
        return arguments, None
    if not objects:
        names = [str(name) for name in chosen]
        if unknown := [name for name in names if name not in arguments]:
            raise InvalidArguments(
                f"save_hyperparameters({', '.join(map(repr, names))}): __init__ has no argument "
                f"{', '.join(map(repr, unknown))}; it has {list(arguments)}"
            )
        return {name: arguments[name] for name in names}, None
    items = _items(objects[0]) if len(chosen) == 1 else None
    if items is None:
        kinds = ", ".join(type(one).__name__ for one in chosen)
        raise InvalidArguments(
            f"save_hyperparameters({kinds}): it takes names of arguments, or one dict, Namespace, dataclass or "
            "DictConfig"
        )
    name = _find_name(objects[0], arguments)
    return items, None if name is None else (name, objects[0], tuple(items))


def _items(value: object) -> dict[str, Value] | None:
    if isinstance(value, Mapping):
        return {key: value[key] for key in value if not _is_unset(value, key)}
    if isinstance(value, Namespace | SimpleNamespace):
        return dict(vars(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    return None


def _is_unset(mapping: object, key: str) -> bool:
    """Whether the item is OmegaConf's "???", which raises when it is read."""
    get_node = getattr(mapping, "_get_node", None)
    return get_node is not None and getattr(get_node(key), "_is_missing", bool)()


def _find_name(value: object, arguments: dict[str, Value]) -> str | None:
    for name, argument in arguments.items():
        if argument is value:
            return name
    for name, argument in arguments.items():
        if type(argument) is type(value) and bool(argument == value):
            return name
    return None
