"""What the driver may ask ranks to do while they train."""

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
    """Leave the group, to meet in one of other ranks."""
    PAUSE = "pause"
    """Stand still until told to go on."""
    PAUSE_IN_PROCESS = "pause in process"
    """Stand still until the next message is asked for."""

    @property
    def ends_run(self) -> bool:
        return self in (Request.STOP, Request.INTERRUPT)
