"""Checkpoint: the kind of callbacks that say when checkpoints are made."""

from __future__ import annotations

from raylight.user.callback import Callback


class Checkpoint(Callback):
    """What ModelCheckpoint and OnExceptionCheckpoint have in common, for `isinstance`."""
