"""From an exception to the message that the driver shows: the user's own frames first."""

from __future__ import annotations

import os
import pickle
import sys
import sysconfig
import traceback

import raylight
from raylight.contract.messages import Failure

PACKAGE = os.path.dirname(os.path.abspath(raylight.__file__))
LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})


def describe_failure(error: BaseException, step: int, stage: str) -> Failure:
    return Failure(
        kind=type(error).__name__,
        text=str(error),
        traceback=format_user_traceback(error),
        step=step,
        stage=stage,
        cause=_pickle(error),
    )


def format_user_traceback(error: BaseException) -> str:
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
    cause = error.__cause__
    if cause is not None:
        lines.append("caused by\n" + format_user_traceback(cause))
    return "".join(lines).rstrip()


def is_users(filename: str) -> bool:
    """Whether a file is neither raylight's, nor installed, nor part of Python."""
    path = os.path.abspath(filename)
    if filename.startswith("<"):
        return filename == "<stdin>" or filename.startswith("<ipython")
    return not path.startswith((PACKAGE + os.sep, *LIBRARIES, os.path.join(sys.prefix, "lib")))


def _pickle(error: BaseException) -> bytes | None:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # some exceptions pickle and do not load
    except Exception:
        return None
    return data
