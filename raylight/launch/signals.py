"""Ctrl-C, SIGTERM and SIGHUP while a run is on: the first one stops it clean, a second Ctrl-C at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from raylight.contract.requests import Request

ONE_PRESS_S = 0.3
"""Within this time it is one press that came twice, as through a program that passes on what its child gets too."""
ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end the process once the run is on storage. A terminal that closes sends the second."""


class Signals:
    """The signals since the run began, and what to do about them."""

    def __init__(self, request: Callable[[Request], None], tell: Callable[[str, str], None]):
        self._request, self._tell = request, tell
        self._pressed_at: float | None = None
        self._is_closing = False
        self.received: list[int] = []

    def close(self) -> None:
        """From here on the run is being written to storage: nothing cuts that short, else its record would be wrong."""
        self._is_closing = True

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        before, now = self._pressed_at, time.monotonic()
        if number == signal.SIGINT:
            self._pressed_at = now
        if len(self.received) == 1:
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            if self._is_closing:
                self._tell_of_closing()
                return
            self._tell(
                f"{name}: the run stops after this step and saves a checkpoint; Ctrl-C again stops it at once",
                "warning",
            )
            self._request(Request.INTERRUPT)
        elif number == signal.SIGINT and (before is None or now - before > ONE_PRESS_S):
            if self._is_closing:
                self._tell_of_closing()
                return
            self.close()
            raise KeyboardInterrupt

    def _tell_of_closing(self) -> None:
        self._tell("Ctrl-C: the run is being written to storage, and ends then; Ctrl-\\ kills it as it is", "warning")


@contextmanager
def stop_on_signal(request: Callable[[Request], None], tell: Callable[[str, str], None]) -> Iterator[Signals]:
    """Requests an interrupt at the first signal; a second Ctrl-C raises KeyboardInterrupt, until the run is being
    closed.

    After a SIGTERM or SIGHUP the process ends by that signal once the run is on storage. Handlers live in the main
    thread only; elsewhere nothing is installed. SIGHUP stays ignored if it was, as under nohup.
    """
    signals = Signals(request, tell)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = [n for n in (signal.SIGINT, *ENDING) if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    ending = next((number for number in signals.received if number in ENDING), None)
    if ending is not None:
        os.kill(os.getpid(), ending)
