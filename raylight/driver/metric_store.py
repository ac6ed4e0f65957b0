"""MetricStore: the values that ranks log, on their way to the journal, the loggers and the trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from raylight.contract.messages import EpochMetrics, StepMetrics
from raylight.driver.aggregate import Row, StepAggregator, say_incomplete
from raylight.driver.epoch_rows import EpochRows
from raylight.driver.journal import Journal
from raylight.driver.loggers import Loggers
from raylight.driver.run_record import describe_error
from raylight.storage.filesystem import Storage


class MetricStore:
    """Merges the step values of all ranks into rows, writes each row once, and holds the newest value of each name.

    `files` is None if nothing is written.
    """

    def __init__(self, files: Storage | None, world_size: int, loggers: Loggers, warn: Callable[[str], None]):
        self._warn, self._loggers = warn, loggers
        self._journal = Journal(files) if files is not None else None
        self._aggregator = StepAggregator(world_size)
        self._epoch_rows = EpochRows()
        self._callback_metrics: dict[str, float] = {}
        self._logged_metrics: dict[str, float] = {}
        self._steps: dict[str, int] = {}  # by name: the step of the value in `callback_metrics`

    # ---- reading

    @property
    def callback_metrics(self) -> dict[str, float]:
        """The newest value of each name, as a copy."""
        return dict(self._callback_metrics)

    @property
    def logged_metrics(self) -> dict[str, float]:
        """The newest value of each name that went to loggers, as a copy."""
        return dict(self._logged_metrics)

    # ---- values as they come

    def add_steps(self, rank: int, message: StepMetrics) -> None:
        self._write(self._aggregator.add(rank, message))

    def add_epoch(self, message: EpochMetrics) -> None:
        if message.logger:  # a hook has given it to one of several, as to each: the first stands for the record
            self._loggers.give(
                self._epoch_rows.take(message), message.step, message.epoch, message.time, message.logger
            )
            return
        # A row of that step is of all ranks, and the end of an epoch may lack one that died since.
        rows_of_it = {name for name in message.of_last_step if self._steps.get(name, -1) == message.step}
        values = {name: value for name, value in message.values.items() if name not in rows_of_it}
        self._callback_metrics |= values
        self._logged_metrics |= {name: values[name] for name in message.of_last_step - rows_of_it}
        self._steps |= dict.fromkeys(values, message.step)
        logged = self._epoch_rows.take(message)
        if logged:
            self._write([(message.step, message.epoch, message.time, logged)], message.logger)

    def take_over(self, values: Mapping[str, float]) -> None:
        """Values that an earlier attempt has measured, until this one measures others."""
        self._callback_metrics |= values

    def _write(self, rows: Iterable[Row], only: int | None = None) -> None:
        for step, epoch, moment, values in rows:
            # A row comes when the slowest rank has sent it, which may be after the end of its epoch.
            newest = {name: value for name, value in values.items() if step >= self._steps.get(name, step)}
            self._logged_metrics |= newest
            self._callback_metrics |= newest
            self._steps |= dict.fromkeys(newest, step)
            if self._journal is not None:
                self._journal.add(step, epoch, values, moment)
            self._loggers.give(values, step, epoch, moment, only)

    # ---- after a failure

    def begin_generation(self) -> None:
        self._epoch_rows.begin_generation()

    def regroup(self, world_size: int, gone: Collection[int], last_step: int) -> None:
        """`world_size` ranks go on after step `last_step`, without the ranks in `gone`."""
        rows, incomplete = self._aggregator.regroup(world_size, gone, last_step)
        self._write(rows)
        if incomplete:
            self._warn(say_incomplete(incomplete, gone))

    def redo_from(self, step: int, world_size: int) -> None:
        """Takes back what was logged beyond `step`, because the steps after it are made again."""
        self._write(self._aggregator.redo(world_size, step))
        if self._journal is not None:
            self._journal.drop_after(step)
        self._loggers.redo_from(step)
        self._epoch_rows.redo_from(step)
        self._steps.clear()

    # ---- storage

    def flush(self) -> None:
        """Before a checkpoint: a run that goes on from it does not log these values again. If the journal cannot write
        them now, it keeps them and tries on."""
        try:
            if self._journal is not None:
                self._journal.flush()
        except Exception as error:
            self._warn(f"values before a checkpoint are not on storage yet: {describe_error(error)}")

    def close(self, status: str, merge: bool) -> None:
        """Brings everything to storage. `merge`: the table of the version is this driver's to write."""
        self._write(self._aggregator.flush())  # rows that some ranks never sent
        try:
            if self._journal is not None:
                self._journal.close(merge=merge)
        except Exception as error:
            self._warn(f"what was logged is not all on storage: {describe_error(error)}")
        self._loggers.close(status)
