"""A version that is about to go on: what is damaged in it is found now, not after all training."""

from __future__ import annotations

from raylight.driver.journal import set_aside_damaged_metrics
from raylight.storage.fence import set_aside_damaged_fence
from raylight.storage.versions import Version


def set_aside_damaged(version: Version) -> None:
    """Keeps what cannot be read under another name, with a warning each. Checkpoints are looked at if one is
    chosen."""
    version.set_aside_damaged_run()
    set_aside_damaged_fence(version.storage)
    set_aside_damaged_metrics(version.storage)
