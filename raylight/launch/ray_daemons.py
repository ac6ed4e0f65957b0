"""The daemons of the Ray that this process has started: if one is killed, the run ends and keeps what it has."""

from __future__ import annotations

import signal
import time
from typing import Any

import ray

from raylight.contract.errors import ClusterError

SAVE_S = 15.0
"""How long the workers may take to save then. Ray ends them, and this process, soon after."""
NAMES = {"gcs_server": "GCS (gcs_server)", "raylet": "raylet"}


class Daemons:
    """The state of the daemons, for one group."""

    def __init__(self) -> None:
        self.dead: str | None = None
        self._deadline = 0.0

    def look(self) -> bool:
        """Whether one was found dead just now."""
        if self.dead is None:
            self.dead = find_dead()
            self._deadline = time.monotonic() + SAVE_S
            return self.dead is not None
        return False

    @property
    def is_too_late(self) -> bool:
        return self.dead is not None and time.monotonic() > self._deadline

    def make_error(self) -> ClusterError:
        return ClusterError(
            f"{self.dead}: the Ray that this process had started is broken. What the workers still held was saved, as "
            "far as they could. Resume with: raylight.fit(..., resume='last'), which starts another Ray"
        )


def find_dead() -> str | None:
    """Which one has ended, and how; None if all live, or if others have started this Ray."""
    processes: dict[str, list[Any]] = getattr(ray._private.worker.global_worker.node, "all_processes", {})
    for kind, name in NAMES.items():
        for info in processes.get(kind, ()):
            status = info.process.poll()
            if status is not None:
                how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                return f"the {name} of the local Ray (process {info.process.pid}) {how}"
    return None
