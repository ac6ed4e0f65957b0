"""sys.stdout and sys.stderr that may be lost while a run is on: the terminal closes, or `| head` has seen enough."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET)
"""Errors of a stream that nobody will ever read again. After others, such as a full disk, it is tried again."""


class LastingStream:
    """A stream that passes text on, and drops it once it is lost; None, as after `>&-`, is lost from the start."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream
        self.is_lost = stream is None

    def write(self, text: str) -> int:
        if self.stream is not None and not self.is_lost:
            try:
                return self.stream.write(text)
            except UnicodeEncodeError:
                raise  # the caller can say it in other letters
            except (OSError, ValueError) as error:
                self._judge(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        if self.stream is not None and not self.is_lost:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._judge(error)

    def isatty(self) -> bool:
        try:
            return self.stream is not None and not self.is_lost and self.stream.isatty()
        except ValueError:  # it is closed
            return False

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "ascii"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _judge(self, error: OSError | ValueError) -> None:
        if isinstance(error, OSError) and error.errno not in GONE:
            return
        self.is_lost = True
        if isinstance(error, OSError) and self.stream in (sys.__stdout__, sys.__stderr__):
            _lead_nowhere(self.stream)
        other = sys.stderr if self is sys.stdout else None
        if other is not None:
            print(f"raylight: the output is lost ({error}); the run goes on without it", file=other, flush=True)


def _lead_nowhere(stream: Any) -> None:
    """Drops buffered text: Python would fail to write it when the process ends, and exit with 120."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        return  # it has no descriptor, and so nothing is left in a buffer of it


@contextmanager
def lasting_streams() -> Iterator[None]:
    """In this block a print, by the user's code too, never fails for want of a reader."""
    _occupy_descriptors()
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    lasting = {name: LastingStream(stream) for name, stream in before.items() if not isinstance(stream, LastingStream)}
    for name, stream in lasting.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in lasting.items():
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])


def _occupy_descriptors() -> None:
    """Opens closed descriptors among 0, 1 and 2 on the null device: otherwise the next file opened, a checkpoint, would
    take what a library prints."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
