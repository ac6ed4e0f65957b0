"""MetricStore: the values that ranks log, on their way to the journal, the loggers and the trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from raylight.contract.errors import StorageError
from raylight.contract.messages import EpochMetrics, StepMetrics
from raylight.driver.aggregate import Row, StepAggregator, say_incomplete
from raylight.driver.epoch_rows import EpochRows
from raylight.driver.journal import Journal
from raylight.driver.logger_feed import Logger, LoggerFeed
from raylight.driver.run_record import describe_error
from raylight.storage.filesystem import Storage


class MetricStore:
    """Merges the step values of all ranks into rows, writes each row once, and holds the newest value of each name.

    `files` is None if nothing is written.
    """

    def __init__(
        self, files: Storage | None, world_size: int, loggers: Collection[Logger], warn: Callable[[str], None]
    ):
        self._warn = warn
        self._loggers = list(loggers)
        self._feeds = [LoggerFeed(logger) for logger in loggers]
        self._journal = Journal(files) if files is not None else None
        self._aggregator = StepAggregator(world_size)
        self._epoch_rows = EpochRows()
        self._callback_metrics: dict[str, float] = {}
        self._logged_metrics: dict[str, float] = {}
        self._steps: dict[str, int] = {}  # by name: the step of the value in `callback_metrics`
        self._logger_error: Exception | None = None

    # ---- reading

    @property
    def callback_metrics(self) -> dict[str, float]:
        """The newest value of each name, as a copy."""
        return dict(self._callback_metrics)

    @property
    def logged_metrics(self) -> dict[str, float]:
        """The newest value of each name that went to loggers, as a copy."""
        return dict(self._logged_metrics)

    @property
    def logger_error(self) -> Exception | None:
        """The first exception of a logger that nobody has taken yet."""
        return self._logger_error

    def take_logger_error(self) -> Exception | None:
        """The exception of a logger, given once. It must not take the place of a failure that came before it."""
        taken, self._logger_error = self._logger_error, None
        return taken

    # ---- values as they come

    def add_steps(self, rank: int, message: StepMetrics) -> None:
        self._write(self._aggregator.add(rank, message))

    def add_epoch(self, message: EpochMetrics) -> None:
        # A row of that step is of all ranks, and the end of an epoch may lack one that died since.
        rows_of_it = {name for name in message.of_last_step if self._steps.get(name, -1) == message.step}
        values = {name: value for name, value in message.values.items() if name not in rows_of_it}
        self._callback_metrics |= values
        self._logged_metrics |= {name: values[name] for name in message.of_last_step - rows_of_it}
        self._steps |= dict.fromkeys(values, message.step)
        logged = self._epoch_rows.take(message)
        if logged:
            self._write([(message.step, message.epoch, message.time, logged)])

    def take_over(self, values: Mapping[str, float]) -> None:
        """Values that an earlier attempt has measured, until this one measures others."""
        self._callback_metrics |= values

    def _write(self, rows: Iterable[Row]) -> None:
        for step, epoch, moment, values in rows:
            # A row comes when the slowest rank has sent it, which may be after the end of its epoch.
            newest = {name: value for name, value in values.items() if step >= self._steps.get(name, step)}
            self._logged_metrics |= newest
            self._callback_metrics |= newest
            self._steps |= dict.fromkeys(newest, step)
            if self._journal is not None:
                self._journal.add(step, epoch, values, moment)
            for feed in self._feeds:
                try:
                    feed.give(values, step, epoch, moment)
                except Exception as error:  # the message that follows says whether a failure is being handled
                    self._logger_error = self._logger_error or error

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
        for feed in self._feeds:
            feed.redo_from(step)
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
        closers = [(type(logger).__name__, _closer(logger, status)) for logger in self._loggers]
        for name, close in [
            ("a logger", self._write_incomplete),
            ("the journal", lambda: self._close_journal(merge)),
            *closers,
        ]:
            try:
                close()
            except (OSError, StorageError) as error:
                self._warn(f"what was logged is not all on storage: {error}")
            except Exception as error:  # of a logger of the user's: the run is over, and its record has to say so
                self._warn(f"what was logged is not all stored: {name} raised {describe_error(error)}")

    def _write_incomplete(self) -> None:
        """Rows that some ranks never sent."""
        self._write(self._aggregator.flush())
        if (error := self.take_logger_error()) is not None:
            raise error

    def _close_journal(self, merge: bool) -> None:
        if self._journal is not None:
            self._journal.close(merge=merge)


def _closer(logger: Logger, status: str) -> Callable[[], object]:
    if hasattr(logger, "finalize"):
        finalize = logger.finalize
        return lambda: finalize("success" if status != "failed" else "failed")
    return getattr(logger, "close", lambda: None)
