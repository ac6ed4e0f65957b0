"""Progress: the counters that say where a rank stands in its run. Every checkpoint holds all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class Progress:
    """One rank's counters; nobody else counts."""

    current_epoch: int = 0
    """Finished epochs."""
    global_step: int = 0
    """Optimizer steps."""
    batch_idx: int = 0
    """Finished batches of this rank in the epoch."""
    num_batches_seen: int = 0
    """Finished batches of this rank in the run."""
    position: int = 0
    """Samples of the epoch that all ranks together have consumed."""
    validated_at: int = -1
    """`num_batches_seen` at the newest validation."""

    step_before: int = 0
    """`global_step` before the newest batch that completed an accumulation window."""
    steps_ahead: int = 0
    """Optimizer steps of the next batch that are made already: it broke after them."""

    @property
    def is_at_start(self) -> bool:
        return self.global_step == self.current_epoch == self.batch_idx == 0

    @property
    def is_validated(self) -> bool:
        """Whether the newest batch has been validated after."""
        return self.validated_at == self.num_batches_seen

    def finish_batch(self, index: int) -> None:
        self.batch_idx = index + 1
        self.num_batches_seen += 1

    def finish_step(self) -> None:
        self.global_step += 1

    def finish_window(self, step_at_batch: int) -> None:
        """The batch that completed it began at this `global_step`."""
        self.step_before = step_at_batch

    def note_steps_ahead(self, step_at_batch: int) -> None:
        self.steps_ahead = self.global_step - step_at_batch

    def skip_step(self) -> None:
        """A step of this batch was made before it broke."""
        self.steps_ahead -= 1

    def forget_steps_ahead(self) -> None:
        self.steps_ahead = 0

    @property
    def has_stepped(self) -> bool:
        """Whether the newest batch made an optimizer step, all of whose batch is done. Training by hand makes none."""
        return (self.global_step != self.step_before or not self.num_batches_seen) and not self.steps_ahead

    def crosses(self, every: int) -> bool:
        """Whether the newest window has reached or passed a multiple of `every` steps; it may make several."""
        return self.step_before // every != self.global_step // every

    def finish_validation(self) -> None:
        self.validated_at = self.num_batches_seen

    def finish_epoch(self) -> None:
        self.current_epoch += 1
        self.batch_idx = self.position = 0

    def take_back(self, num_batches: int) -> None:
        """These newest batches are made again."""
        self.batch_idx -= num_batches
        self.num_batches_seen -= num_batches

    def enter_epoch_at(self, index: int) -> None:
        """Another number of workers counts other batches in the same part of an epoch."""
        self.batch_idx = index

    def note_position(self, position: int) -> None:
        self.position = position

    def stand_at(self, step: int, epoch: int, batch_idx: int = 0) -> None:
        """As after so many steps and epochs, for an evaluation or a replay."""
        self.global_step, self.current_epoch, self.batch_idx = step, epoch, batch_idx

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        known = {"step_before": max(0, state["global_step"] - 1), "steps_ahead": 0, **state}  # older ones lack these
        for field in fields(self):
            setattr(self, field.name, known[field.name])
