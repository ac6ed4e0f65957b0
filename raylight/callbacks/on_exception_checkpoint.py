"""OnExceptionCheckpoint: a checkpoint of the last finished step when user code raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylight.callbacks.checkpoint import Checkpoint
from raylight.callbacks.mistake_list import Mistakes

if TYPE_CHECKING:
    from raylight.contract.config import Config, FilePath
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


class OnExceptionCheckpoint(Checkpoint):
    """Does what `Checkpointing.on_exception` does by default: the last finished step is saved when user code
    raises, and `resume="last"` goes on from there. With checkpoints turned off it is an error.

    `dirpath` and `filename` are accepted as in Lightning 2.6 and change nothing, as the checkpoint lies among the
    others of its version; the run says so if `dirpath` is given.
    """

    def __init__(self, dirpath: FilePath | None = None, filename: str = "on_exception"):
        mistakes = Mistakes("OnExceptionCheckpoint")
        mistakes.require(bool(filename), "filename must not be empty.")
        mistakes.raise_any()
        self.dirpath = dirpath
        self.filename = filename

    def _find_mistakes(self, config: Config) -> list[str]:
        if config.checkpoint is None and not config.fast_dev_run:
            return ["OnExceptionCheckpoint and checkpoint=False contradict each other; keep one of them."]
        if config.checkpoint is not None and not config.checkpoint.on_exception:
            return ["OnExceptionCheckpoint and on_exception=False contradict each other; keep one of them."]
        return []

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if stage == "fit" and self.dirpath is not None and trainer.is_global_zero:
            trainer.notice(
                f"OnExceptionCheckpoint(dirpath={str(self.dirpath)!r}) is not used: checkpoints lie in "
                "<version>/checkpoints/step-N.",
                "warning",
            )
