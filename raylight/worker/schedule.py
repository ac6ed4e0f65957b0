"""When a run validates, saves and ends: decisions that come out the same on every rank."""

from __future__ import annotations

from datetime import timedelta

from raylight.contract.errors import InvalidArguments
from raylight.contract.task import Begin
from raylight.worker.worker import Worker

NEVER = 0
AT_EPOCH_END = -1  # where the length of an epoch is unknown
ON_REQUEST = -2  # of the driver, which has the clock


class Schedule:
    """Reads the counters of its worker and changes nothing."""

    def __init__(self, worker: Worker):
        self.worker, self.config = worker, worker.config
        self.val_every = self._validation_interval()

    # ---- the end

    def is_finished(self) -> bool:
        """Asked between epochs."""
        worker, config = self.worker, self.config
        if worker.status == "interrupted" or worker.data.num_batches == 0 or self._is_out_of_steps():
            return True
        epoch = worker.progress.current_epoch
        if config.max_epochs is not None and config.max_epochs != -1 and epoch >= config.max_epochs:
            return True
        return self._may_stop()

    def stops_in_epoch(self) -> bool:
        """Asked after each batch."""
        worker = self.worker
        stops = worker.should_stop and (worker.status == "interrupted" or self._may_stop())
        return stops or self._is_out_of_steps()

    def is_epoch_whole(self) -> bool:
        """Whether this epoch's batches are all done; one of unknown length is, unless the run stops in it."""
        worker = self.worker
        if worker.data.num_batches is None:
            return not self.stops_in_epoch()
        return worker.progress.batch_idx >= worker.data.num_batches or not self.stops_in_epoch()

    def _is_out_of_steps(self) -> bool:
        return self.config.max_steps != -1 and self.worker.progress.global_step >= self.config.max_steps

    def _may_stop(self) -> bool:
        """should_stop counts once the minimum of epochs and steps is reached."""
        worker, config = self.worker, self.config
        enough_steps = worker.progress.global_step >= (config.min_steps or 0)
        return worker.should_stop and enough_steps and worker.progress.current_epoch >= (config.min_epochs or 0)

    # ---- checkpoints

    def saves_after_step(self, window: int) -> bool:
        """`window`: batches accumulated since the last optimizer step; a checkpoint lies between two steps."""
        worker, checkpoint = self.worker, self.config.checkpoint
        if worker.saving.snapshots is None or checkpoint is None or window:
            return False
        if worker.saving.is_requested:
            return True
        return self._is_step_due() and worker.saving.saved_at != worker.progress.num_batches_seen

    def must_save(self) -> bool:
        """Whether this step's checkpoint is one that no other can stand for: of weights that were just validated, which
        may be the best, of those that are kept all, or of which a ModelCheckpoint wants a file."""
        checkpoint = self.config.checkpoint
        if checkpoint is None:
            return False
        keeps_all = -1 in (checkpoint.keep_best, checkpoint.keep_last)
        is_ordered = bool(self.worker.saving.orders)
        return is_ordered or self.worker.progress.is_validated or (keeps_all and self._is_step_due())

    def saves_after_validation(self) -> bool:
        """With no interval set, a validation in the middle of an epoch makes a checkpoint as one at its end does."""
        return self.config.checkpoint is not None and not self._has_interval()

    def saves_after_epoch(self) -> bool:
        worker, checkpoint = self.worker, self.config.checkpoint
        if worker.saving.snapshots is None or checkpoint is None:
            return False
        if worker.saving.is_requested:
            return True
        every = checkpoint.every_n_epochs if self._has_interval() else 1
        if every and worker.progress.current_epoch % every == 0:
            return True
        return self._is_step_due() and worker.saving.saved_at != worker.progress.num_batches_seen

    def _has_interval(self) -> bool:
        checkpoint = self.config.checkpoint
        assert checkpoint is not None
        return bool(checkpoint.every_n_epochs or checkpoint.every_n_steps or checkpoint.every_s)

    def _is_step_due(self) -> bool:
        every = self.config.checkpoint.every_n_steps if self.config.checkpoint is not None else None
        return every is not None and self.worker.progress.crosses(every)

    # ---- validation

    def validates_after_batch(self, last: bool) -> bool:
        """`last`: it was the epoch's last batch. That counts where there is one validation an epoch, as an epoch that
        was begun by another number of workers has another number of batches."""
        if self.val_every <= 0:
            return self.val_every == ON_REQUEST and self.worker.is_validation_requested and self._is_validation_epoch()
        if self.config.val_check_interval == 1.0 and not isinstance(self.config.val_check_interval, int):
            return last and self._is_validation_epoch()
        worker, across_epochs = self.worker, self.config.check_val_every_n_epoch is None
        count = worker.progress.num_batches_seen if across_epochs else worker.progress.batch_idx
        return count % self.val_every == 0 and self._is_validation_epoch()

    def validates_before_stop(self, window: int) -> bool:
        """Whether a hook stops the run after this batch: then its weights are validated, as in Lightning. `window`:
        batches accumulated since the last optimizer step."""
        worker = self.worker
        if window or self.val_every in (NEVER, AT_EPOCH_END) or worker.status != "finished":
            return False
        return self._may_stop() and self._is_validation_epoch() and not worker.progress.is_validated

    def validates_after_epoch(self) -> bool:
        return self.val_every == AT_EPOCH_END and self._is_validation_epoch()

    def reloads(self, opened_in: int) -> bool:
        """Whether loaders that were made in that epoch are made again in this one."""
        every = self.config.reload_dataloaders_every_n_epochs
        return bool(every) and self.worker.progress.current_epoch - opened_in >= every

    def _is_validation_epoch(self) -> bool:
        every = self.config.check_val_every_n_epoch
        return every is None or (self.worker.progress.current_epoch + 1) % every == 0

    def _check_reached(self, interval: int, num_batches: int | None) -> None:
        """A validation that never comes is an error; of a run that goes on with other workers it is told."""
        if num_batches is None or interval <= num_batches or self.config.check_val_every_n_epoch is None:
            return
        text = (
            f"val_check_interval={interval} is more than the {num_batches} batches of an epoch"
            f"{self._say_for_each()}, so that validation would never run: give at most {num_batches}, or "
            "check_val_every_n_epoch=None to count batches over epochs, or limit_val_batches=0 for no validation"
        )
        if isinstance(self.worker.task.mode, Begin):
            raise InvalidArguments(text)
        self.worker.warn_once(text)

    def say_never_validated(self) -> None:
        """At the end of a run that had something to validate with."""
        worker, config = self.worker, self.config
        progress, has_ended = worker.progress, worker.status == "finished"
        if self.val_every == NEVER or progress.validated_at >= 0 or not has_ended or not progress.num_batches_seen:
            return
        every = config.check_val_every_n_epoch
        if every is not None and progress.current_epoch < every:
            reason = f"check_val_every_n_epoch={every}, and {progress.current_epoch} whole epochs were trained"
        elif isinstance(config.val_check_interval, int):
            counted = "in all" if every is None else "in each epoch"
            reason = f"val_check_interval={config.val_check_interval}, and there were fewer batches {counted}"
        else:
            reason = f"the run ended after {progress.num_batches_seen} batches"
        worker.warn_once(f"validation never ran: {reason}{self._say_for_each()}")

    def _say_for_each(self) -> str:
        return f" for each of {self.worker.world_size} workers" if self.worker.world_size > 1 else ""

    def _validation_interval(self) -> int:
        """Training batches from one validation to the next."""
        worker, interval, num_batches = self.worker, self.config.val_check_interval, self.worker.data.num_batches
        if not self.config.limit_val_batches or not worker.hooks.overrides("validation_step"):
            return NEVER
        data = worker.evaluation_data.get("validate") or worker.open_evaluation_data("validate")
        if data.total == 0:
            return NEVER
        if isinstance(interval, timedelta):
            return ON_REQUEST
        if isinstance(interval, int):
            self._check_reached(interval, num_batches)
            return interval
        if num_batches is not None:
            return max(1, int(num_batches * interval))
        if interval != 1.0:
            raise InvalidArguments(
                f"val_check_interval={interval} is a fraction of an epoch, and this epoch's length is unknown; give a "
                "number of batches (an int) or a time"
            )
        return AT_EPOCH_END
