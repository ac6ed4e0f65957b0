"""What user code raised is raised again as WorkerFailed and as its own class, in this process and from a worker."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from raylight.contract.errors import WorkerFailed, WorkerHung
from raylight.contract.messages import Failure
from raylight.contract.user_error import pack, unpack, with_users_class
from raylight.worker.diagnosis.failure import describe_failure


class Several(Exception):
    """Its constructor wants other arguments than it keeps, and it holds what cannot be sent."""

    def __init__(self, code: int, detail: Any):
        super().__init__(f"code {code}", detail)
        self.code, self.detail, self.lock = code, detail, threading.Lock()

    @property
    def step(self) -> str:
        return "the user's"


class Slotted(ValueError):
    __slots__ = ("place",)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Refusing(Exception):
    def __init_subclass__(cls, **options: Any):
        raise TypeError("no subclasses")


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def raised_by(action: Any) -> BaseException:
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


def throw(error: Exception) -> Any:
    raise error


def last_line(error: BaseException) -> str | None:
    return traceback.extract_tb(error.__traceback__)[-1].line


def slotted() -> Slotted:
    error = Slotted("s")
    error.place = "here"
    return error


CASES = {
    "several": lambda: throw(Several(3, torch.ones(2))),
    "slots": lambda: throw(slotted()),
    "frozen": lambda: throw(Frozen(3)),
    "file": lambda: Path("/no/such/file").read_text(),
    "text": lambda: b"\xff".decode(),
    "json": lambda: json.loads("{"),
    "key": lambda: {}["a"],
    "attribute": lambda: (1).no_such,
    "import": lambda: __import__("no_such_module"),
    "syntax": lambda: compile("a b", "file.py", "exec"),
    "stop": lambda: next(iter(())),
    "memory": lambda: throw(torch.OutOfMemoryError("CUDA out of memory")),
    "group": lambda: throw(ExceptionGroup("g", [ValueError(1), Several(1, 2)])),
}
FIELDS = {
    "file": ("errno", "filename", "strerror"), "text": ("start", "object", "reason"), "json": ("pos", "doc"),
    "import": ("name",), "syntax": ("lineno", "text", "msg"), "attribute": ("name",), "slots": ("place",),
    "frozen": ("code",), "several": ("code",), "stop": ("value",),
}  # fmt: skip


@pytest.mark.parametrize("is_sent", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_it_is_both_and_keeps_what_it_held(name, is_sent):
    original = raised_by(CASES[name])
    cause = unpack(pack(original)) if is_sent else original
    error = with_users_class(WorkerHung("rank 1 failed", rank=1, step=7), cause)
    again = pickle.loads(pickle.dumps(copy.copy(error)))
    for found in (error, again):
        assert isinstance(found, type(original))
        assert isinstance(found, WorkerHung)
        assert str(found) == "rank 1 failed"
        assert (found.rank, found.step) == (1, 7)
        assert type(found.cause) is type(original)
        assert len(found.args) == len(original.args)
        for field in FIELDS.get(name, ()):
            assert getattr(found, field) == getattr(original, field) == getattr(found.cause, field)
    assert type(error).__name__ == type(original).__name__
    if not is_sent:
        assert error.cause is original
        assert last_line(error) == last_line(original)


def test_what_cannot_be_sent_is_left_out_and_the_rest_arrives():
    original = Several(3, threading.Lock())
    original.__cause__ = KeyError("first")
    sent = unpack(pack(original))
    assert sent.args[0] == "code 3"
    assert "lock" in sent.args[1]  # as text
    assert sent.code == 3
    assert not hasattr(sent, "lock")
    assert sent.__cause__.args == ("first",)


def test_a_chain_in_a_circle_and_a_long_one_end():
    first, second = KeyError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    assert unpack(pack(first)).__context__.__context__ is None
    assert "second" in describe_failure(first, 0, "train").traceback
    error: BaseException = ValueError(0)
    for number in range(1, 100):
        another = ValueError(number)
        another.__cause__, another.__context__ = error, KeyError(number)
        error = another
    assert len(pack(error)) < 1 << 20


def test_a_class_that_cannot_be_combined_leaves_the_cause():
    error = with_users_class(WorkerFailed("failed"), Refusing("x"))
    assert type(error) is WorkerFailed
    assert isinstance(error.cause, Refusing)
    assert error.__cause__ is error.cause


def test_a_class_that_is_not_known_here_arrives_as_what_it_is_derived_from(monkeypatch):
    error = json.JSONDecodeError("bad", "{", 0)
    monkeypatch.setattr(type(error), "__reduce__", None, raising=False)
    data = pack(error).replace(b"JSONDecodeError", b"JSONDecodeErrrr")
    assert type(unpack(data)) is ValueError


def test_a_class_of_the_script_arrives_as_the_same_class_untouched(monkeypatch):
    """Loaded by value, the methods that the worker has would take the place of those that are here."""
    main = sys.modules["__main__"]
    kind = type("Scripted", (Exception,), {"__module__": "__main__", "where": "worker"})
    monkeypatch.setattr(main, "Scripted", kind, raising=False)
    data = pack(kind("x"))
    kind.where = "driver"
    assert type(unpack(data)) is kind
    assert kind.where == "driver"


def test_an_exception_whose_text_fails_is_described():
    failure = describe_failure(raised_by(lambda: throw(Mute())), 3, "train")
    assert isinstance(failure, Failure)
    assert "raised RuntimeError" in failure.text
    assert isinstance(failure.load_cause(), Mute)
