"""A terminal for programs that draw into one, with nobody looking: progress bars cost what they really cost."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator


@contextlib.contextmanager
def unseen_terminal() -> Iterator[None]:
    """Inside, stdout and stderr of Python are a terminal that another process reads and forgets."""
    master, slave = os.openpty()
    reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(master)
    try:
        with (
            os.fdopen(slave, "w", buffering=1) as terminal,
            contextlib.redirect_stdout(terminal),
            contextlib.redirect_stderr(terminal),
        ):
            yield
    finally:
        reader.wait()
