"""Requests of the driver to ranks while they train."""

from __future__ import annotations

from enum import StrEnum


class Request(StrEnum):
    """All ranks do it at the same step boundary."""

    SAVE = "save"
    """Make a checkpoint."""
    VALIDATE = "validate"
    """Validate; its time has come."""
    STOP = "stop"
    """End training; the run is "stopped"."""
    INTERRUPT = "interrupt"
    """End training because of a signal; the run is "interrupted"."""
    RESIZE = "resize"
    """Leave the process group and join a new one with other ranks."""
    PAUSE = "pause"
    """Pause until the driver lets it continue."""
    PAUSE_IN_PROCESS = "pause in process"
    """Pause until the next message is read."""

    @property
    def ends_run(self) -> bool:
        return self in (Request.STOP, Request.INTERRUPT)
