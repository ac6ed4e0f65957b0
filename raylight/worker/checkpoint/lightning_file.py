"""One file with the state of a run, under the keys that Lightning's files have."""

from __future__ import annotations

import os

from raylight.contract.kinds import StateDict
from raylight.user.strategy_facade import FileIO
from raylight.worker.checkpoint.contents import collect_lightning
from raylight.worker.worker import Worker

TRAINING_KEYS = ("optimizer_states", "lr_schedulers", "callbacks", "loops")


def write_lightning_file(worker: Worker, path: str | os.PathLike[str], weights_only: bool) -> None:
    """Rank 0 writes; the others wait, so that the file is there when any of them goes on."""
    worker.saving.finish_copying()
    checkpoint: StateDict = {"pytorch-lightning_version": "2.0.0", **collect_lightning(worker)}
    if weights_only:
        checkpoint = {key: value for key, value in checkpoint.items() if key not in TRAINING_KEYS}
    with worker.metrics.outside():
        worker.hooks.call("on_save_checkpoint", checkpoint)
    if worker.is_first:
        FileIO().save_checkpoint(checkpoint, path)
    worker.barrier()
