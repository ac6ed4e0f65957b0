"""Starts a script again if it is killed, which neither a Ray job nor a shell does for a driver that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

WAIT_S = 1.0
"""Seconds before it starts again, in which its workers notice that the driver is gone and give their resources back."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def supervise(command: Sequence[str], num_retries: int) -> int:
    """Runs `command` and returns its exit status. If a signal ends it, as `kill -9` or the lack of memory does, it is
    started again, up to `num_retries` times. A script goes on from its last checkpoint with `fit(resume="last")`.

    SIGTERM, SIGINT and SIGHUP are passed on, and end it for good. The script gets a terminal's Ctrl-C anyway; SIGHUP
    goes to the first process of the session alone.
    """
    received: list[int] = []
    for attempt in range(num_retries + 1):
        status = _follow(command, received)
        if status >= 0 or received:
            return status if status >= 0 else 128 - status
        name = signal.Signals(-status).name
        left = num_retries - attempt
        _say(
            f"raylight run: the script was ended by {name}; "
            + (f"it starts again ({left} left)" if left else f"retries={num_retries} are used up")
        )
        if left:
            time.sleep(WAIT_S)
    return 128 - status


def _follow(command: Sequence[str], received: list[int]) -> int:
    """The exit status of one life of the script; signals that come meanwhile are added to `received`."""
    if hasattr(signal, "sigwaitinfo"):
        return _follow_by_waiting(command, received)
    return _follow_by_handlers(command, received)


def _follow_by_waiting(command: Sequence[str], received: list[int]) -> int:
    """Waits for signals, whose sender the kernel then names."""
    awaited = {number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN}  # nohup ignores SIGHUP
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited | {signal.SIGCHLD})
    try:
        child = subprocess.Popen(command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before))
        while child.poll() is None:
            info = signal.sigwaitinfo(awaited | {signal.SIGCHLD})
            if info.si_signo in awaited:
                received.append(info.si_signo)
                is_terminals = info.si_signo == signal.SIGINT and info.si_code > 0  # from the kernel
                if not is_terminals:
                    child.send_signal(info.si_signo)
        return child.returncode
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_by_handlers(command: Sequence[str], received: list[int]) -> int:
    """For systems that do not name a signal's sender: one that comes in the foreground counts as the terminal's."""
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        if child is not None and not (number == signal.SIGINT and _is_in_foreground()):
            child.send_signal(number)

    numbers = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        child = subprocess.Popen(command)
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_in_foreground() -> bool:
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):  # nobody reads it any more: the script goes on without
        sys.stderr = None
