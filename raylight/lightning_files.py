"""The files of ModelCheckpoint, made of committed native checkpoints."""

from __future__ import annotations

from raylight.contract.kinds import StateDict
from raylight.contract.messages import FileWanted
from raylight.driver.checkpoint_files import FileMaker
from raylight.storage.checkpoints import Checkpoint
from raylight.user.checkpoint_io import CheckpointIO
from raylight.worker.checkpoint.lightning_file import find_left_out, make_from_saved


class LightningFiles(FileMaker):
    """Lightning's files. `owner` is the module's class, whose hyperparameters they hold."""

    def __init__(self, io: CheckpointIO, owner: type):
        self._io, self._owner = io, owner

    def write(self, checkpoint: Checkpoint, wanted: FileWanted) -> list[str]:
        made: StateDict = make_from_saved(checkpoint, wanted.weights_only, self._owner)
        made["epoch"] = wanted.epoch  # the one that is going on, as long as its last hooks are running
        if wanted.state is not None and "callbacks" in made:
            made["callbacks"] = made["callbacks"] | dict([wanted.state])
        self._io.save_checkpoint(made, wanted.path)
        return find_left_out(made)

    def remove(self, path: str) -> None:
        self._io.remove_checkpoint(path)
