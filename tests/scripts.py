"""Drivers as scripts: each in a session of its own, with a Ray of its own, and nothing of it may be left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Script:
    """A driver in a session of its own; everything it starts carries a mark in its environment."""

    def __init__(self, folder: Path, text: str, python: str = sys.executable, path: str | None = None):
        script = folder / "script.py"
        script.write_text(text)
        self.mark = uuid.uuid4().hex
        environment = os.environ | {
            "RAYLIGHT_TEST_MARK": self.mark,
            "RAY_raylet_start_wait_time_s": "300",  # on a machine that is busy with other tests
            "PYTHONUNBUFFERED": "1",
        }
        for name in ("RAY_ADDRESS", "PYTEST_CURRENT_TEST"):
            environment.pop(name, None)
        if path is not None:
            environment["PYTHONPATH"] = path
        self.process = subprocess.Popen(
            [python, str(script)],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def finish(self, errors: str | None = "") -> str:
        """The rest of what it prints; it must end well, and print to stderr what is said here (None: anything)."""
        out, err = self.process.communicate(timeout=280)
        assert self.process.returncode == 0, err
        assert err == errors or errors is None
        return out

    def processes(self) -> list[str]:
        """Command lines of all living processes that stem from it."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if command:  # a zombie has none
                        found.append(f"{entry.name} {command}")
            except OSError:
                continue  # it ended meanwhile
        return found

    def assert_nothing_is_left(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while self.processes():
            assert time.monotonic() < deadline, self.processes()
            time.sleep(0.05)


@contextmanager
def scripts_in(folder: Path) -> Iterator[Callable[[str], Script]]:
    """Starts scripts by their text; those that still run at the end are killed with all that they started."""
    scripts: list[Script] = []

    def start(text: str) -> Script:
        scripts.append(Script(folder, text))
        return scripts[-1]

    yield start
    for script in scripts:
        for line in script.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)
        script.process.wait()
