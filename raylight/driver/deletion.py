"""A version's folder that somebody deletes while its run goes on."""

from __future__ import annotations

from raylight.contract.errors import StorageError, Superseded
from raylight.storage.versions import Version


def is_deleted(version: Version, started_at: float) -> bool:
    """Whether run.json, which the run began with, is gone. Raises Superseded if another run has claimed the folder
    since."""
    try:
        found = version.read_run()
    except StorageError:  # it is damaged or out of reach, and so not gone
        return False
    if found and found.get("started_at") != started_at:
        raise Superseded(
            f"{version.path} was deleted while this run went on, and another has begun in it: this one writes nothing "
            "more there."
        )
    return not found


def describe_deletion(version: Version) -> str:
    return (
        f"{version.path} was deleted while the run went on: checkpoints, logs and evidence that were in it are lost. "
        "What comes from here on is written there again."
    )
