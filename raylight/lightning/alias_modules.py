"""Modules that carry Lightning's names, made from the table when they are imported.

`raylight.utilities.types`, say, is no file. Where raylight has a file of that name and Lightning's module has more
names, the table completes it.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from raylight.contract.kinds import Value
from raylight.lightning.names import HERE, read
from raylight.lightning.refused import REFUSED, StandIn, stand_in

ROOT = "raylight"

_Entry = tuple[str, str]
"""The module and the name there, or "" and the sentence that refuses the name."""


def _collect() -> tuple[dict[str, dict[str, _Entry]], dict[str, str]]:
    """The names of each module, and the sentence of each module that is refused as a whole."""
    names: dict[str, dict[str, _Entry]] = {}
    whole: dict[str, str] = {}
    for row in HERE:
        for module in row.modules:
            names.setdefault(module, {}).update({name: (row.place, ours) for name, ours in read(row).items()})
    for refused in REFUSED:
        for module in refused.modules:
            if refused.names == "*":
                whole[module] = refused.sentence
            else:
                names.setdefault(module, {}).update({name: ("", refused.sentence) for name in refused.names.split()})
    for module in [*names, *whole]:  # a.b.c makes a.b and a
        while "." in module:
            module = module.rpartition(".")[0]
            names.setdefault(module, {})
    return names, whole


NAMES, REFUSED_MODULES = _collect()


def is_known(module: str) -> bool:
    """Whether Lightning has this module, by the table."""
    return module in NAMES or refusal_of(module) is not None


def refusal_of(module: str) -> str | None:
    """The sentence of a module that is refused as a whole, or that lies in one."""
    return next((s for start, s in REFUSED_MODULES.items() if module == start or module.startswith(f"{start}.")), None)


def find_entry(module: str, name: str) -> _Entry | None:
    """Where the name of a module of Lightning's is here, or why it is not; None if the table does not say."""
    entry = NAMES.get(module, {}).get(name)
    if entry is None and (sentence := refusal_of(module)) is not None:
        return "", sentence
    return entry


def find(module: str, name: str) -> Value:
    """The object that a name of Lightning's stands for; raises AttributeError if the table does not have it."""
    entry = find_entry(module, name)
    if entry is None:
        raise AttributeError(_say_unknown(module, name))
    place, what = entry
    if not place:
        return stand_in(name, f"{ROOT}.{module}", what)
    return getattr(importlib.import_module(f"{ROOT}.{place}"), what)


def say_what_is_wrong(module: str, name: str) -> str | None:
    """Why a name of Lightning's cannot be used here, or that it is unknown; None if it can be."""
    if (sentence := refusal_of(f"{module}.{name}")) is not None:
        return f"{name} is not in raylight: {sentence}"
    try:
        value = getattr(importlib.import_module(f"{ROOT}.{module}" if module else ROOT), name)
    except (ModuleNotFoundError, AttributeError) as error:
        return str(error)
    return value.say() if isinstance(value, StandIn) else None


def _say_unknown(module: str, name: str) -> str:
    near = difflib.get_close_matches(name, NAMES.get(module, {}), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"module '{ROOT}.{module}' has no attribute {name!r}{hint}"


_MISSING = object()


def _knows(path: str, name: str) -> bool:
    return find_entry(path, name) is not None or is_known(f"{path}.{name}")


def _complete(module: ModuleType) -> None:
    """Lets the module find the table's names when they are first asked for."""
    path = module.__name__.removeprefix(f"{ROOT}.")
    own: Callable[[str], Value] | None = vars(module).get("__getattr__")

    def __getattr__(name: str) -> Value:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _MISSING
        try:
            value = own(name) if own is not None else _MISSING
        except AttributeError:
            if not _knows(path, name):
                raise
        if value is _MISSING:
            is_module = find_entry(path, name) is None and is_known(f"{path}.{name}")
            value = importlib.import_module(f"{module.__name__}.{name}") if is_module else find(path, name)
        setattr(module, name, value)
        return value

    vars(module)["__getattr__"] = __getattr__


class _AliasLoader(Loader):
    """Fills a module that is no file."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        path = module.__name__.removeprefix(f"{ROOT}.")
        sentence = refusal_of(path)
        module.__doc__ = f"Not in raylight: {sentence}." if sentence else "Lightning's names for what raylight has."
        names = sorted(NAMES.get(path, {}))
        setattr(module, "__all__", names)  # noqa: B010
        setattr(module, "__dir__", lambda: names)  # noqa: B010
        _complete(module)


class _CompletedLoader(Loader):
    """Runs a file, then lets it find the other names of Lightning's module too."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if not hasattr(module, "__path__"):  # a file in whose place Lightning has a folder, such as `trainer`
            module.__path__ = []
        _complete(module)

    def __getattr__(self, name: str) -> Value:  # get_source, get_resource_reader, ... as tracebacks and tools ask for
        return getattr(self.loader, name)


class _Finder(MetaPathFinder):
    """Finds modules of Lightning's names below `raylight`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        below = fullname.removeprefix(f"{ROOT}.")
        if below == fullname or not is_known(below):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return ModuleSpec(fullname, _AliasLoader(), is_package=True)
        spec.loader = _CompletedLoader(spec.loader)
        return spec


def install() -> None:
    """Makes the modules importable; `import raylight` calls it."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
