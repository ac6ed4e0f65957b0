"""`trainer.fit_loop` and its siblings: progress of the loops under Lightning's names, read-only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylight.user.states import RunningStage

if TYPE_CHECKING:
    from raylight.contract.config import Config
    from raylight.contract.kinds import Loader
    from raylight.user.run_view import RunView


@dataclass(frozen=True, slots=True)
class Counts:
    """How many items a loop has begun and ended; between two hooks they differ by one."""

    ready: int
    started: int
    processed: int
    completed: int


@dataclass(frozen=True, slots=True)
class LoopProgress:
    """`current` counts since the epoch began, `total` since the run began."""

    current: Counts
    total: Counts

    @classmethod
    def of(cls, current: int, total: int, in_hand: int = 0) -> LoopProgress:
        """`in_hand`: 1 while an item has begun and not ended."""
        return cls(*(Counts(n + in_hand, n + in_hand, n, n) for n in (current, total)))


class EvaluationLoopFacade:
    """`trainer.validate_loop`, `test_loop`, `predict_loop`, and `fit_loop.epoch_loop.val_loop`."""

    def __init__(self, view: RunView, stage: RunningStage):
        self._view, self._stage = view, stage

    @property
    def dataloaders(self) -> Loader:
        return getattr(self._view, f"{self._stage.dataloader_prefix}_dataloaders")

    _combined_loader = dataloaders

    @property
    def max_batches(self) -> list[int | float]:
        """Batches of each loader, over all workers."""
        counts: list[int | float] = getattr(self._view, f"num_{self._stage.dataloader_prefix}_batches")
        return counts

    @property
    def num_dataloaders(self) -> int:
        return len(self.max_batches)

    @property
    def restarting(self) -> bool:
        return False


class EpochLoopFacade:
    """`trainer.fit_loop.epoch_loop`: the batches of one epoch."""

    def __init__(self, view: RunView, config: Config):
        self._view, self._config = view, config
        self.val_loop = EvaluationLoopFacade(view, RunningStage.VALIDATING)

    @property
    def batch_idx(self) -> int:
        """Index of the batch in hand, or of the newest; -1 before the first."""
        return self._view.batch_idx - 1 + self._view.has_batch

    @property
    def total_batch_idx(self) -> int:
        """As `batch_idx`, counted since the run began."""
        return self._view.num_batches_seen - 1 + self._view.has_batch

    @property
    def global_step(self) -> int:
        return self._view.global_step

    @property
    def batch_progress(self) -> LoopProgress:
        return LoopProgress.of(self._view.batch_idx, self._view.num_batches_seen, int(self._view.has_batch))

    @property
    def max_steps(self) -> int:
        return self._config.max_steps

    @property
    def min_steps(self) -> int | None:
        return self._config.min_steps

    @property
    def restarting(self) -> bool:
        return self._view.is_resuming


class FitLoopFacade:
    """`trainer.fit_loop`: the epochs of a fit."""

    def __init__(self, view: RunView, config: Config):
        self._view, self._config = view, config
        self.epoch_loop = EpochLoopFacade(view, config)

    @property
    def epoch_progress(self) -> LoopProgress:
        in_hand = int(self._view.stage in (RunningStage.TRAINING, RunningStage.VALIDATING))
        return LoopProgress.of(self._view.current_epoch, self._view.current_epoch, in_hand)

    @property
    def max_epochs(self) -> int | None:
        return self._config.max_epochs

    @property
    def min_epochs(self) -> int | None:
        return self._config.min_epochs

    @property
    def max_steps(self) -> int:
        return self._config.max_steps

    @property
    def min_steps(self) -> int | None:
        return self._config.min_steps

    @property
    def max_batches(self) -> int | float:
        """Batches of this worker in an epoch; `inf` if the data has no length."""
        return self._view.num_training_batches

    @property
    def batch_idx(self) -> int:
        return self.epoch_loop.batch_idx

    @property
    def total_batch_idx(self) -> int:
        return self.epoch_loop.total_batch_idx

    @property
    def restarting(self) -> bool:
        """Whether this fit continues a checkpoint and has not made a step yet."""
        return self._view.is_resuming

    @property
    def done(self) -> bool:
        return self._view.stage is None and self._view.status.stopped
