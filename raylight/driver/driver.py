"""Driver: takes the workers' messages for one version, and passes each to the object that owns what it is about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, Protocol

from raylight.contract import messages as m
from raylight.contract.config import Checkpointing, Config, to_plain
from raylight.contract.errors import StorageError, Superseded
from raylight.contract.kinds import Value
from raylight.contract.layout import CHECKPOINTS
from raylight.driver.checkpoint_files import CheckpointFiles, FileMaker
from raylight.driver.departed_values import DepartedValues
from raylight.driver.goodput import GoodputClock
from raylight.driver.logger_feed import Logger
from raylight.driver.loggers import Loggers
from raylight.driver.metric_store import MetricStore
from raylight.driver.outcome import Outcome
from raylight.driver.run_record import JsonObject, RunRecord, describe_error
from raylight.driver.saved_checkpoints import describe_file, describe_saving
from raylight.driver.shelf import Shares, Shelf
from raylight.storage import single_file
from raylight.storage.checkpoints import Checkpoint
from raylight.storage.summaries import is_number
from raylight.storage.versions import Version

P = ParamSpec("P")


class Sink(Protocol):
    """An onlooker, as the console is."""

    def handle(self, rank: int, message: m.Message) -> None: ...


class Driver:
    """One version while it runs. `version` is None if nothing is written (fast_dev_run, predict); a follow-up, as a
    test after a fit, writes beside the fit and leaves its record as it is."""

    def __init__(
        self, version: Version | None, config: Config, world_size: int, sinks: Iterable[Sink],
        loggers: Sequence[Logger], attempt: int = 0, protected: str | None = None, is_follow_up: bool = False,
        file_maker: FileMaker | None = None, describe: Callable[[m.FileWanted], Value] | None = None,
    ):  # fmt: skip
        """`protected`: the path of the checkpoint that the run was resumed from. `describe`: the ModelCheckpoint
        that wanted a file, for loggers that upload it; None if there is none, and they get raylight's checkpoints."""
        self.version, self.config, self.attempt = version, config, attempt
        self.loggers = Loggers(loggers, self.warn)
        files = version.storage if version is not None else None
        self.record = RunRecord(version, config, attempt, self.warn, is_follow_up)
        self.shelf = Shelf(files, config.checkpoint or Checkpointing(), attempt, self.warn, protected)
        self._saved = describe_saving(config.checkpoint or Checkpointing())
        self.files = CheckpointFiles(file_maker, self.warn, lambda: self._later(self._retain), self._tell_written)
        self._describe_file = describe
        self.metrics = MetricStore(files, world_size, self.loggers, self.warn)
        self.goodput_clock = GoodputClock()
        self.outcome = Outcome()
        self.departed_values = DepartedValues()
        self._sinks, self._world_size, self._is_follow_up = list(sinks), world_size, is_follow_up
        self._awaiting: set[int] = set()  # ranks that wait for files
        self._logged_hyperparameters: dict[str, Value] = {}
        self._step = self._epoch = 0
        self._is_ending = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="raylight storage")
        self._writes: list[Future[None]] = []

    # ---- reading

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def step(self) -> int:
        """The furthest that a rank has reported."""
        return self._step

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def num_restarts(self) -> int:
        """How often the group was formed again, over all attempts of the version."""
        return self.record.num_restarts

    @property
    def callback_metrics(self) -> dict[str, float]:
        return self.metrics.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, float]:
        return self.metrics.logged_metrics

    @property
    def goodput(self) -> dict[str, float]:
        """Seconds by what they went to."""
        first = self.outcome.first
        return self.goodput_clock.read(first.seconds if first is not None else {})

    # ---- messages

    def handle(self, rank: int, message: m.Message) -> None:
        """Raises Superseded once another driver has taken over the version."""
        if self.record.superseded is not None:
            raise self.record.superseded
        self.goodput_clock.follow(rank, message)
        if isinstance(message, m.StepMetrics):
            self.metrics.add_steps(rank, message)
        elif isinstance(message, m.Progress):
            self._note_progress(rank, message)
        elif isinstance(message, m.EpochMetrics):
            self.metrics.add_epoch(message)
            self._step = max(self._step, message.step)
        elif isinstance(message, m.Saved):
            shares = self.shelf.add(rank, message, self._world_size)
            if shares is not None:
                self._later(self._commit, shares)
        elif isinstance(message, m.SaveFailed):
            self.shelf.drop_failed(rank, message, self._is_ending)
            self._later(self.files.note_lost, message.directory)
        elif isinstance(message, m.LoggerCall):
            self.loggers.call(message)
        elif isinstance(message, m.FileOrders):
            self._later(self._take_orders, message)
        elif isinstance(message, m.FilesAwaited):
            self._awaiting.add(rank)
        elif isinstance(message, m.Hyperparameters):
            self._note_hyperparameters(message)
        elif isinstance(message, m.Started | m.Finished | m.Failure | m.Died | m.PeerLost):
            self.outcome.note(rank, message)
        for sink in self._sinks:
            sink.handle(rank, message)

    def _note_progress(self, rank: int, message: m.Progress) -> None:
        if message.stage == "train":
            self._step, self._epoch = max(self._step, message.step), message.epoch
            if message.share:  # none in the middle of a step that accumulates
                self.departed_values.note(rank, message.epoch, message.share)

    def _note_hyperparameters(self, message: m.Hyperparameters) -> None:
        self.record.add_hyperparameters(message.values)
        self._later(self.write_record)
        self._logged_hyperparameters |= message.values if message.logged is None else message.logged
        if self._logged_hyperparameters:
            self.loggers.log_hyperparameters(to_plain(self._logged_hyperparameters))

    def add_sink(self, sink: Sink) -> None:
        self._sinks.append(sink)

    def tell(self, text: str, level: str = "info") -> None:
        """Shows a sentence of the driver itself to the person."""
        for sink in self._sinks:
            sink.handle(0, m.Notice(text, level))

    def warn(self, text: str) -> None:
        self.tell(text, "warning")

    # ---- storage

    def _later(self, write: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> None:
        """Storage may be slow or away; in-process the training loop shares this thread and does not wait for it."""
        self._writes.append(self._writer.submit(write, *arguments, **named))

    def wait_for_storage(self) -> None:
        """Returns once all writes that were begun have ended; the person has read why one failed."""
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def make_awaited_files(self) -> bool:
        """Once all ranks wait for the files of the run: returns when they are there, and says True."""
        if len(self._awaiting) < self._world_size:
            return False
        self._awaiting.clear()
        self.wait_for_storage()
        self.files.wait()
        return True

    def _commit(self, shares: Shares) -> None:
        self.metrics.flush()
        try:
            self._look_for_deletion()
            wanted = self.files.wanted_of(shares[min(shares)].directory)
            committed = self.shelf.commit(shares, self.record.seed, wanted)
            self.goodput_clock.note_commit()
            self._saved.read(self.shelf)
            if self._describe_file is None:  # a logger may read it: only then others are deleted
                self.loggers.after_save_checkpoint(self._saved)
            self.files.note_commit(committed)
            self._retain()
        except Superseded as error:
            self.record.leave(error)
        except Exception as error:
            self.files.note_lost(shares[min(shares)].directory)
            self.warn(f"the checkpoint of step {shares[min(shares)].step} is lost: {describe_error(error)}")
        self.write_record()

    def _take_orders(self, orders: m.FileOrders) -> None:
        self.files.add(orders, self.shelf.find(orders.directory))

    def _tell_written(self, wanted: m.FileWanted) -> None:
        self.loggers.after_save_checkpoint((self._describe_file or describe_file)(wanted))

    def _retain(self) -> None:
        self.shelf.retain(self.files.needed)

    def make_missing_files(self, checkpoint: Checkpoint) -> None:
        """The run goes on from a checkpoint of its own, of which files were to be made when it was killed."""
        missing = tuple(file for file in checkpoint.manifest.wanted if not single_file.is_file(file.path))
        if missing:
            directory = f"{CHECKPOINTS}/{checkpoint.name}"
            self._later(self.files.add, m.FileOrders(directory, checkpoint.step, missing), checkpoint)

    def _look_for_deletion(self) -> None:
        if self.record.is_deleted():
            self.shelf.list_again()
            self.write_record()

    def write_record(self) -> None:
        self.record.write(self.metrics.callback_metrics, self.shelf.best, self.shelf.last)

    # ---- a run from its beginning to its end

    def start(self, given: Mapping[str, object]) -> None:
        """Writes the first run.json; `given` are facts to record beside the arguments."""
        self.record.begin(self._world_size, given)
        if not self._is_follow_up:
            self.write_record()

    def redo_from(self, step: int) -> None:
        """The steps after this one are made again: what was logged and saved beyond it counts for nothing."""
        self.metrics.redo_from(step, self._world_size)
        self.shelf.redo_from(step)
        self.files.redo_from(step)

    def take_over(self, checkpoint: Checkpoint) -> None:
        """Takes the metrics of this version as of a checkpoint of its own, until the run measures others."""
        if self.version is not None and checkpoint.storage.parent().parent().uri == self.version.path:
            self.take_over_record(self.record.metrics)
            self.metrics.take_over(checkpoint.metrics)

    def take_over_record(self, recorded: JsonObject) -> None:
        """Takes the numbers among the metrics of an earlier record."""
        self.metrics.take_over({name: float(value) for name, value in recorded.items() if is_number(value)})

    def begin_generation(
        self, world_size: int, reason: str, gone: Collection[int] = (), last_step: int | None = None,
        is_ending: bool = False,
    ) -> None:  # fmt: skip
        """A new group of as many ranks begins. `gone`: those that died or left; the others go on after step
        `last_step`. `is_ending`: the run is given up, and only its last state is saved."""
        self._world_size, self._is_ending = world_size, is_ending
        self._awaiting.clear()
        self.metrics.begin_generation()
        self.wait_for_storage()
        self.shelf.begin_generation()
        self.files.note_lost()
        self.outcome.begin_generation()
        if last_step is not None:
            self.metrics.regroup(world_size, gone, last_step)
        self.record.add_restart(self._step, world_size, reason)
        self.write_record()

    def finish(self, finished: m.Finished) -> None:
        """The workers are done, as rank 0 says; the rest is the driver's."""
        self._step, self._epoch = finished.step, finished.epoch
        self.goodput_clock.finish()

    def close(self, status: str) -> None:
        """Brings everything to storage. Called once, whatever happened."""
        self.wait_for_storage()
        self.files.close()
        self.wait_for_storage()
        self._check_owner()
        self.record.end(status, self.goodput)
        self.metrics.close(status, merge=self.record.superseded is None)
        self.write_record()
        self._writer.shutdown()

    def _check_owner(self) -> None:
        """A run that has made no checkpoint for a while does not know yet that it was superseded, or deleted."""
        if self._is_follow_up:
            return
        try:
            self.record.check_attempt()
            self._look_for_deletion()
        except StorageError as error:
            if isinstance(error, Superseded):
                self.record.leave(error)
            self.warn(str(error))
