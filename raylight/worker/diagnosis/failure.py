"""From an exception to the message that the driver shows: the user's own frames first."""

from __future__ import annotations

import functools
import glob
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import raylight
from raylight.contract.errors import (
    CheckpointCorrupt,
    CheckpointMismatch,
    DataError,
    InvalidArguments,
    NotEnoughResources,
)
from raylight.contract.messages import Failure
from raylight.contract.user_error import describe_beside, pack, say

PACKAGE = os.path.dirname(os.path.abspath(raylight.__file__))
PERMANENT = (
    InvalidArguments, DataError, CheckpointMismatch, CheckpointCorrupt, NotEnoughResources,
    NotImplementedError, ImportError, SyntaxError, NameError,
)  # fmt: skip
"""User code or arguments get these wrong the same way every time, so that trying again would only hide them."""
P = ParamSpec("P")
T = TypeVar("T")
LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})
INSTALLED = re.compile(r"[\\/](site|dist)-packages[\\/]")
"""Of this environment, of the one below it, or of the user: Python may take packages from all of them."""


def describe_failure(error: BaseException, step: int, stage: str) -> Failure:
    return Failure(
        kind=type(error).__name__,
        text=say(error),
        traceback=format_user_traceback(error),
        step=step,
        stage=stage,
        cause=pack(error),
        is_permanent=isinstance(error, PERMANENT),
    )


def format_user_traceback(error: BaseException, above: frozenset[int] = frozenset()) -> str:
    """The traceback with the user's frames alone; frames of raylight and of libraries are counted.

    Where no frame is the user's, the whole traceback is given: then the fault is elsewhere.
    """
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if is_users(frame.filename)]
    if not users:
        return "".join(traceback.format_exception(error)).rstrip()
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(users)]
    tail = frames[frames.index(users[-1]) + 1 :]
    if tail:
        last = tail[-1]
        lines.append(
            f'  ... {len(tail)} library frames, the last in "{last.filename}", line {last.lineno}, {last.name}\n'
        )
    lines += traceback.format_exception_only(error)
    cause, context = error.__cause__, error.__context__
    if cause is not None and id(cause) not in above:
        lines.append("caused by\n" + format_user_traceback(cause, above | {id(error)}))
    elif context is not None and not error.__suppress_context__ and id(context) not in above:
        lines.append("while this was being handled:\n" + format_user_traceback(context, above | {id(error)}))
    return "".join(lines).rstrip()


def is_users(filename: str) -> bool:
    """Whether a file is neither raylight's, nor installed, nor part of Python."""
    path = os.path.abspath(filename)
    if filename.startswith("<"):
        return filename == "<stdin>" or filename.startswith("<ipython")
    if path.startswith((PACKAGE + os.sep, *LIBRARIES, os.path.join(sys.prefix, "lib"))) or INSTALLED.search(path):
        return False
    return not any(path.startswith(folder + os.sep) and _is_installed(path, folder) for folder in sys.path if folder)


def _is_installed(path: str, folder: str) -> bool:
    return os.path.relpath(path, folder).split(os.sep, 1)[0] in _installed_in(folder)


@functools.cache
def _installed_in(folder: str) -> frozenset[str]:
    """Top-level files and folders that pip has put into a folder of sys.path, as `pip install --target` does."""
    names: set[str] = set()
    for record in glob.glob(os.path.join(glob.escape(folder), "*.dist-info", "RECORD")):
        with open(record, encoding="utf-8") as file:
            names |= {line.split(",", 1)[0].split("/", 1)[0] for line in file}
    return frozenset(names)


class Aftermath:
    """What is done because of a failure, user code among it. What fails in that is noted, and the rest is done."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def attempt(self, what: str, action: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T | None:
        """What `action` returns; None where it fails."""
        try:
            return action(*arguments, **keywords)
        except (Exception, SystemExit) as another:  # an exit would end the worker, and with it the first error
            self.notes.append(describe_beside(what, another))
            return None
