"""The metric that decides which checkpoint is best: that it is logged at all."""

from __future__ import annotations

from raylight.arguments.checks import say_unknown_metric
from raylight.contract.errors import InvalidArguments
from raylight.worker.worker import Worker


class MonitorWatch:
    """Looks for `monitor` when checkpoints are made, until it was found once."""

    def __init__(self, worker: Worker, validates: bool):
        options = worker.config.checkpoint
        self.worker, self.validates = worker, validates
        # a ModelCheckpoint looks for its own when a file is due
        is_watched = any(hasattr(callback, "checkpointing") for callback in worker.hooks.callbacks)
        has_one = options is not None and options.keep_best != 0 and not is_watched
        self.monitor = options.monitor if options is not None and has_one else None
        self._epoch, self._validated_at = worker.progress.current_epoch, worker.progress.validated_at

    def look(self, is_final: bool = False) -> None:
        """Raises InvalidArguments once an epoch with its validation is over and the metric was not logged in it; warns
        if there is no validation, or the run ends before."""
        worker, progress = self.worker, self.worker.progress
        if self.monitor is None:
            return
        known = worker.metrics.newest()
        if self.monitor in known:
            self.monitor = None
            return
        is_whole = progress.current_epoch > self._epoch
        text = say_unknown_metric(self.monitor, known)
        if is_whole and self.validates and progress.validated_at != self._validated_at:
            raise InvalidArguments(text)
        if is_final or (is_whole and not self.validates):
            worker.warn_once(text)
            self.monitor = None
