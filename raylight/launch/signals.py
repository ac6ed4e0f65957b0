"""Ctrl-C and SIGTERM while a run is on: the first one stops it clean, the second at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from raylight.contract.requests import Request


@contextmanager
def stop_on_signal(request: Callable[[Request], None], tell: Callable[[str, str], None]) -> Iterator[None]:
    """`request(Request.INTERRUPT)` is called at the first signal; a second Ctrl-C raises KeyboardInterrupt.

    After a SIGTERM the process ends by that signal once the run is on storage. Handlers live in the main thread only;
    elsewhere nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT and len(received) > 1:
            raise KeyboardInterrupt
        if len(received) == 1:
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            tell(
                f"{name}: the run stops after this step and saves a checkpoint; Ctrl-C again stops it at once",
                "warning",
            )
            request(Request.INTERRUPT)

    before: dict[int, Any] = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    if signal.SIGTERM in received:
        os.kill(os.getpid(), signal.SIGTERM)
