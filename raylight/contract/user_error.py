"""The user's own exception: sent from a worker part by part, and raised again as WorkerFailed and its own class."""

from __future__ import annotations

import io
import os
import pickle
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import cloudpickle

import raylight
from raylight.contract.errors import WorkerFailed
from raylight.contract.kinds import Value

T = TypeVar("T")
Sent = tuple[str, Any]
"""How a value is sent, and its data: ("value", bytes), ("text", str), ("exception", its parts)."""

PACKAGE = os.path.dirname(os.path.abspath(raylight.__file__)) + os.sep
LINKS = ("__cause__", "__context__")
FACTS = ("rank", "node", "step", "attempt", "cause", "log")
"""Attributes of WorkerFailed; the user's attributes of these names are on its `cause`."""
MAX_LINKS = 8
"""How deep a chain of exceptions, each raised from the next, is followed."""
_FIXED = {"args", "message", "exceptions"}  # set when it is made; the last two are of a group
_set = BaseException.__setattr__  # a frozen dataclass has one that refuses
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)


def with_users_class(failed: WorkerFailed, cause: BaseException) -> WorkerFailed:
    """`failed` as an instance of the cause's class too, with its arguments, attributes and traceback, and its text its
    own. If no class can be both, `failed` itself, raised from `cause`."""
    failed.cause = cause
    try:
        both = _combine(type(failed), type(cause))
        error = _make(both, cause.args, {**_members(cause), **vars(cause)})
        vars(error).update({name: getattr(failed, name) for name in FACTS}, _text=str(failed))
        vars(error).update({"__notes__": list(cause.__notes__)} if hasattr(cause, "__notes__") else {})
    except Exception:  # a metaclass, `__init_subclass__` or `__new__` of the user's may refuse in any way
        failed.__cause__ = cause
        return failed
    assert isinstance(error, WorkerFailed)
    for name in (*LINKS, "__suppress_context__"):
        _set(error, name, getattr(cause, name))
    return error.with_traceback(_without_own_frames(cause.__traceback__))


def pack(error: BaseException) -> bytes:
    """For `unpack` in another process; what cannot be sent of it is left out, and of its arguments sent as text."""
    return pickle.dumps(_take_apart(error, frozenset()))


def unpack(data: bytes) -> BaseException | None:
    """The exception that `pack` took apart; None if not even a base class of it is known here, or if it cannot be made
    from its parts."""
    return _put_together(pickle.loads(data))


@contextmanager
def beside(first: BaseException, doing: str) -> Iterator[None]:
    """Around what is done because of `first`: what fails in it becomes a note to `first`, and does not take its
    place."""
    try:
        yield
    except Exception as another:
        first.add_note(describe_beside(doing, another))


def describe_beside(doing: str, another: BaseException) -> str:
    """One paragraph on an exception that came while another was handled."""
    frames = traceback.extract_tb(another.__traceback__)
    where = f' (File "{frames[-1].filename}", line {frames[-1].lineno})' if frames else ""
    return f"While this was handled, {doing} raised {type(another).__name__}: {say(another)}{where}"


def say(error: BaseException) -> str:
    """`str(error)`, which is user code and may raise."""
    try:
        return str(error)
    except Exception as another:
        return f"<no text: str() of it raised {type(another).__name__}>"


# ---- one class out of two


def _combine(failed: type[WorkerFailed], users: type[BaseException]) -> type[BaseException]:
    """Named as the user's class, which is what a traceback then shows."""

    def fill(namespace: dict[str, Value]) -> None:
        namespace.update(dict.fromkeys(FACTS))  # else properties of these names would be in the way
        namespace.update(
            __module__=users.__module__, __qualname__=users.__qualname__, __doc__=users.__doc__,
            __str__=_say_text, __reduce__=_reduce, __reduce_ex__=lambda self, protocol: _reduce(self),
        )  # fmt: skip

    return types.new_class(users.__name__, (failed, users), {}, fill)


def _say_text(error: Value) -> str:
    text: str = error._text
    return text


def _reduce(error: Value) -> tuple[object, ...]:
    kind = next(base for base in type(error).__mro__ if base.__module__ == WorkerFailed.__module__)
    facts = {name: getattr(error, name) for name in FACTS if name != "cause"}
    notes = [note for note in getattr(error, "__notes__", []) if isinstance(note, str)]
    return _rebuild, (kind, error._text, facts, pack(error.cause), notes)


def _rebuild(
    kind: type[WorkerFailed], text: str, facts: dict[str, Value], packed: bytes, notes: list[str]
) -> WorkerFailed:
    failed, cause = kind(text, **facts), unpack(packed)
    error = with_users_class(failed, cause) if cause is not None else failed
    vars(error).update({"__notes__": notes} if notes else {})
    return error


def _make(kind: type[BaseException], args: tuple[Value, ...], attributes: dict[str, Value]) -> BaseException:
    """Without `__init__`, which may want other arguments than those that the exception was left with."""
    pythons = [base for base in kind.__mro__ if base.__module__ == "builtins"]
    error: BaseException = pythons[0].__new__(kind, *args)
    _set(error, "args", args)
    members = {name: owner for owner in reversed(kind.__mro__) for name in _described(owner)}
    for name, value in attributes.items():
        if name in members:
            vars(members[name])[name].__set__(error, value)
        else:
            vars(error)[name] = value
    return error


def _described(owner: type) -> Iterator[str]:
    """Names that a class keeps outside `__dict__`: its slots, and the fields of Python's own exceptions."""
    for name, descriptor in vars(owner).items():
        if isinstance(descriptor, _DESCRIPTORS) and name not in _FIXED and not name.startswith("__"):
            yield name


def _members(error: BaseException) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for owner in type(error).__mro__:
        for name in _described(owner):
            try:
                found.setdefault(name, vars(owner)[name].__get__(error))
            except AttributeError:
                continue  # it was never set
    return found


def _without_own_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    """The frames of the user, torch and other libraries, so that a debugger starts there; all frames if there are only
    raylight's."""
    kept, link = [], trace
    while link is not None:
        if not link.tb_frame.f_code.co_filename.startswith(PACKAGE):
            kept.append(link)
        link = link.tb_next
    rest = None
    for link in reversed(kept):
        rest = types.TracebackType(rest, link.tb_frame, link.tb_lasti, link.tb_lineno)
    return rest or trace


# ---- from one process to another


def _take_apart(error: BaseException, above: frozenset[int]) -> dict[str, Value]:
    above |= {id(error)}
    kinds = [kind for kind in type(error).__mro__ if issubclass(kind, BaseException) and kind is not BaseException]
    attributes = {name: _send(value, above) for name, value in {**_members(error), **vars(error)}.items()}
    links = {name: getattr(error, name) for name in LINKS if len(above) < MAX_LINKS}
    if links.get("__context__") is error.__cause__:  # as after `raise ... from`
        links.pop("__context__", None)
    return {
        "kinds": [sent for kind in kinds if (sent := _attempt(_dump, kind)) is not None],
        "args": [_send(value, above) or ("text", _show(value)) for value in error.args],
        "attributes": {name: sent for name, sent in attributes.items() if sent is not None},
        "links": {
            name: _take_apart(link, above) for name, link in links.items() if link is not None and id(link) not in above
        },
        "suppress": error.__suppress_context__,
    }


def _put_together(parts: dict[str, Value]) -> BaseException | None:
    args = tuple(_receive(sent, f"<{sent[0]} that cannot be loaded here>") for sent in parts["args"])
    missing = object()
    received = {name: _receive(sent, missing) for name, sent in parts["attributes"].items()}
    attributes = {name: value for name, value in received.items() if value is not missing}
    kinds = (_attempt(_load, sent) for sent in parts["kinds"])
    made = (_attempt(_make, kind, args, attributes) for kind in kinds if kind is not None)
    error: BaseException | None = next((error for error in made if error is not None), None)
    if error is not None:
        for name, link in parts["links"].items():
            _set(error, name, _put_together(link))
        _set(error, "__suppress_context__", parts["suppress"])
    return error


def _send(value: Value, above: frozenset[int]) -> Sent | None:
    """None if it cannot be sent. Exceptions inside, such as those of a group, are taken apart too."""
    if isinstance(value, BaseException):
        return ("exception", _take_apart(value, above)) if id(value) not in above else None
    if type(value) in (list, tuple) and any(isinstance(item, BaseException) for item in value):
        sent = [_send(item, above) or ("text", _show(item)) for item in value]
        return type(value).__name__, sent
    dumped = _attempt(_dump, value)
    return ("value", dumped) if dumped is not None else None


def _receive(sent: Sent, default: object) -> Value:
    kind, data = sent
    if kind == "exception":
        return _put_together(data) or default
    if kind in ("list", "tuple"):
        items = [_receive(item, default) for item in data]
        return items if kind == "list" else tuple(items)
    if kind == "text":
        return data
    loaded = _attempt(lambda: (_load(data),))
    return loaded[0] if loaded is not None else default


def _attempt(action: Callable[..., T], *arguments: object) -> T | None:
    """None if it fails: user code takes part in pickling, and may fail in any way."""
    try:
        return action(*arguments)
    except Exception:
        return None


def _show(value: object) -> str:
    return _attempt(repr, value) or f"<{type(value).__qualname__}>"


def _dump(value: object) -> bytes:
    file = io.BytesIO()
    _Sender(file).dump(value)
    return file.getvalue()


def _load(data: bytes) -> Value:
    return _Receiver(io.BytesIO(data)).load()


class _Sender(cloudpickle.Pickler):
    """Sends classes of a script or notebook by name and by value. If a process that knows them loaded them by value,
    their methods and attributes would be overwritten by the worker's copies."""

    def persistent_id(self, value: object) -> tuple[str, str, bytes | None] | None:
        if not isinstance(value, type) or (value.__module__ != "__main__" and value.__module__ in sys.modules):
            return None
        return value.__module__, value.__qualname__, _attempt(cloudpickle.dumps, value)


class _Receiver(pickle.Unpickler):
    def persistent_load(self, identity: Value) -> Value:
        module, name, dumped = identity
        found: object = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        return found if isinstance(found, type) else cloudpickle.loads(dumped)
