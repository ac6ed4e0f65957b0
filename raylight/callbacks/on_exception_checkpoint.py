"""OnExceptionCheckpoint: a checkpoint of what there is when user code raises."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raylight.callbacks.callback import Callback
from raylight.callbacks.mistakes import Mistakes
from raylight.config import Checkpointing

if TYPE_CHECKING:
    from raylight.module import Module
    from raylight.worker.rank import Rank


class OnExceptionCheckpoint(Callback):
    """Turns on `Checkpointing.on_exception`, which is on by default: the last finished step is saved when user code
    raises, and `resume="last"` goes on from there.

    `dirpath` and `filename` are accepted as in Lightning 2.6 and change nothing, as the checkpoint lies among the
    others of its version; the run says so where `dirpath` is given.
    """

    def __init__(self, dirpath: Any = None, filename: str = "on_exception"):
        mistakes = Mistakes("OnExceptionCheckpoint")
        mistakes.require(bool(filename), "filename must not be empty.")
        mistakes.raise_any()
        self.dirpath = dirpath
        self.filename = filename

    def checkpointing(self, other: Checkpointing | None = None) -> Checkpointing:
        """`other`, what else was asked for, with saving on an exception."""
        return replace(other or Checkpointing(), on_exception=True)

    def setup(self, trainer: Rank, module: Module, stage: str) -> None:
        if stage == "fit" and self.dirpath is not None and trainer.is_global_zero:
            trainer.notice(
                f"OnExceptionCheckpoint(dirpath={str(self.dirpath)!r}) is not used: checkpoints lie in "
                "<version>/checkpoints/step-N.",
                "warning",
            )
