"""A script that is started again where it was killed: what a Ray job, or a shell, lacks for a driver that dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

WAIT_S = 1.0
"""Before it starts again: its workers notice that their driver is gone, and give their resources back."""
FORWARDED = (signal.SIGTERM, signal.SIGINT)


def supervise(command: Sequence[str], num_retries: int) -> int:
    """Runs `command` and returns its exit status; where a signal has ended it, as by `kill -9` or for want of memory,
    it is started again, `num_retries` times. A script goes on from its last checkpoint with `fit(resume="last")`.

    SIGTERM and SIGINT are passed on, and end it for good.
    """
    child: subprocess.Popen[bytes] | None = None
    told: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        told.append(number)
        if child is not None:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in FORWARDED}
    try:
        for attempt in range(num_retries + 1):
            child = subprocess.Popen(command)
            status = child.wait()
            if status >= 0 or told:
                return status if status >= 0 else 128 - status
            name = signal.Signals(-status).name
            left = num_retries - attempt
            print(
                f"raylight run: the script was ended by {name}; "
                + (f"it starts again ({left} left)" if left else f"retries={num_retries} are used up"),
                file=sys.stderr, flush=True,
            )  # fmt: skip
            if left:
                time.sleep(WAIT_S)
        return 128 - status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
