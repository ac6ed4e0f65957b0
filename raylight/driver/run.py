"""Run: the driver's side of one version. It takes the workers' messages, and owns all that is on storage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from raylight.contract import messages as m
from raylight.contract.config import Checkpointing, Config, describe, mask_command, to_plain
from raylight.contract.errors import StorageError, Superseded
from raylight.driver.aggregate import StepAggregator, say_incomplete
from raylight.driver.deletion import describe_deletion, is_deleted
from raylight.driver.epoch_rows import EpochRows
from raylight.driver.goodput import Ledger
from raylight.driver.journal import Journal
from raylight.driver.logger_feed import LoggerFeed
from raylight.storage import checkpoints as store
from raylight.storage.checkpoints import Checkpoint, Manifest
from raylight.storage.fence import check_attempt
from raylight.storage.retention import best, retain
from raylight.storage.summaries import is_number
from raylight.storage.versions import Version

RECORDED_PACKAGES = ("raylight", "torch", "torchvision", "ray", "pyarrow", "numpy", "tensorboard")


class Sink(Protocol):
    """Someone who looks on: the console."""

    def handle(self, rank: int, message: m.Message) -> None: ...


class Logger(Protocol):
    """Where aggregated values go: TensorBoard, CSV, or the user's own."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...


@dataclass(slots=True)
class Outcome:
    """What the ranks said last."""

    finished: dict[int, m.Finished] = field(default_factory=dict)
    failures: dict[int, m.Failure | m.Died | m.PeerLost] = field(default_factory=dict)
    nodes: dict[int, m.Started] = field(default_factory=dict)

    def take_outputs(self) -> list[m.BatchOutputs]:
        """What each rank predicted. It is not kept, since the driver lives as long as the trainer."""
        taken = [self.finished[rank].outputs for rank in sorted(self.finished)]
        self.finished = {rank: replace(message, outputs=[]) for rank, message in self.finished.items()}
        return taken

    def take_failures(self) -> dict[int, m.Failure | m.Died | m.PeerLost]:
        taken, self.failures = self.failures, {}
        return taken


class Run:
    """One version while it runs. `version` is None where nothing is written (fast_dev_run, predict)."""

    def __init__(
        self, version: Version | None, config: Config, world_size: int, sinks: Iterable[Sink], loggers: list[Any],
        attempt: int = 0, protected: str | None = None,
    ):  # fmt: skip
        self.version, self.config, self.world_size, self.attempt = version, config, world_size, attempt
        self.sinks, self.loggers = list(sinks), loggers
        self.feeds = [LoggerFeed(logger) for logger in loggers]
        self.outcome = Outcome()
        self.ledger = Ledger()
        self.aggregator = StepAggregator(world_size)
        self.journal = Journal(version.storage) if version is not None else None
        self.callback_metrics: dict[str, float] = {}
        self.logged_metrics: dict[str, float] = {}
        self._of_step: dict[str, int] = {}  # by name: the step of the value in `callback_metrics`
        self._epoch_rows = EpochRows()
        self.step, self.epoch = 0, 0
        self.saved: dict[str, dict[int, m.Saved]] = {}
        self._given_up = ""  # the directory of a checkpoint that a group which has shrunk since had begun
        self.shares: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        """By rank: the epoch, and what it has logged in it."""
        self.checkpoints: list[Checkpoint] = store.list_checkpoints(version.storage) if version is not None else []
        # Never deleted: the checkpoint that this run was resumed from, and those that others were told of.
        self.protected: set[str] = {protected} if protected else set()
        self.is_ending = False  # it is given up, and only its last state is saved
        self.is_follow_up = False  # a test after a fit writes beside it, and leaves its record as it is
        self.superseded: Superseded | None = None  # another driver has taken over, and owns what is on storage
        self.hyperparameters: dict[str, Any] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="raylight storage")
        self._writes: list[Future[None]] = []
        self.began = time.time()
        self.record: dict[str, Any] = {}
        self._logger_error: Exception | None = None
        self._record_problem = ""  # told last, until it is over
        self._on: dict[type, Callable[[int, Any], None]] = {
            m.Started: self._on_started,
            m.StepMetrics: self._on_step_metrics,
            m.EpochMetrics: self._on_epoch_metrics,
            m.Progress: self._on_progress,
            m.Saved: self._on_saved,
            m.SaveFailed: self._on_save_failed,
            m.Hyperparameters: self._on_hyperparameters,
            m.Finished: lambda rank, message: self.outcome.finished.__setitem__(rank, message),
            m.Failure: self._on_failure,
            m.Died: self._on_failure,
            m.PeerLost: self._on_failure,
        }

    # ---- messages

    def handle(self, rank: int, message: m.Message) -> None:
        """Raises Superseded once another driver has taken over the version."""
        if self.superseded is not None:
            raise self.superseded
        if self._logger_error is not None and not isinstance(message, m.Failure | m.Died | m.PeerLost | m.Notice):
            raise self._logger_error
        self.ledger.follow(rank, message)
        action = self._on.get(type(message))
        if action is not None:
            action(rank, message)
        for sink in self.sinks:
            sink.handle(rank, message)

    def tell(self, text: str, level: str = "info") -> None:
        """Something the driver itself has to say."""
        for sink in self.sinks:
            sink.handle(0, m.Notice(text, level))

    def _later(self, write: Callable[..., None], *arguments: Any) -> None:
        """Storage may be slow or away; in-process the training loop shares this thread and does not wait for it."""
        self._writes.append(self._writer.submit(write, *arguments))

    def wait_for_storage(self) -> None:
        """All that was begun is on storage, or the person was told why not."""
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def _on_started(self, rank: int, message: m.Started) -> None:
        self.outcome.nodes[rank] = message

    def _on_failure(self, rank: int, message: m.Failure | m.Died | m.PeerLost) -> None:
        self.outcome.failures[rank] = message

    def _on_progress(self, rank: int, message: m.Progress) -> None:
        if message.stage == "train":
            self.step, self.epoch = max(self.step, message.step), message.epoch
            if message.share:  # none in the middle of a step that accumulates
                self.shares[rank] = [(message.epoch, message.share)]

    def _on_step_metrics(self, rank: int, message: m.StepMetrics) -> None:
        for step, epoch, moment, values in self.aggregator.add(rank, message):
            self._write_values(step, epoch, moment, values)

    def _on_epoch_metrics(self, rank: int, message: m.EpochMetrics) -> None:
        # A row of that step is of all ranks, and the end of an epoch may be without one that died since.
        rows_of_it = {name for name in message.of_last_step if self._of_step.get(name, -1) == message.step}
        values = {name: value for name, value in message.values.items() if name not in rows_of_it}
        self.callback_metrics |= values
        self.logged_metrics |= {name: values[name] for name in message.of_last_step - rows_of_it}
        self._of_step |= dict.fromkeys(values, message.step)
        self.step = max(self.step, message.step)
        logged = self._epoch_rows.take(message)
        if logged:
            self._write_values(message.step, message.epoch, message.time, logged)

    def _write_values(self, step: int, epoch: int, moment: float, values: dict[str, float]) -> None:
        # A row comes when the slowest rank has sent it, which may be after the end of its epoch.
        newest = {name: value for name, value in values.items() if step >= self._of_step.get(name, step)}
        self.logged_metrics |= newest
        self.callback_metrics |= newest
        self._of_step |= dict.fromkeys(newest, step)
        if self.journal is not None:
            self.journal.add(step, epoch, values, moment)
        for feed in self.feeds:
            try:
                feed.give(values, step, epoch, moment)
            except Exception as error:  # the message that follows says whether a failure is being handled
                self._logger_error = self._logger_error or error

    def take_logger_error(self) -> Exception | None:
        """What a logger has raised, once. It must not take the place of a failure that was there before it."""
        taken, self._logger_error = self._logger_error, None
        return taken

    def redo_from(self, step: int) -> None:
        """What was logged beyond `step` is taken back: the steps after it are made again. Checkpoints beyond it are
        damaged or of no use: they count for nothing, and stay on storage for a person to look at."""
        for row in self.aggregator.redo(self.world_size, step):
            self._write_values(*row)
        if self.journal is not None:
            self.journal.drop_after(step)
        for feed in self.feeds:
            feed.redo_from(step)
        self._epoch_rows.redo_from(step)
        self._of_step.clear()
        self.saved.clear()
        self.checkpoints = [checkpoint for checkpoint in self.checkpoints if checkpoint.step <= step]

    def take_over(self, checkpoint: Checkpoint) -> None:
        """The metrics of this version as of a checkpoint of its own, until the run measures others."""
        if self.version is not None and checkpoint.storage.parent().parent().uri == self.version.path:
            recorded = self.record.get("metrics", {}).items()
            earlier = {name: float(value) for name, value in recorded if is_number(value)}
            self.callback_metrics = {**earlier, **checkpoint.metrics}

    def _on_hyperparameters(self, rank: int, message: m.Hyperparameters) -> None:
        self.hyperparameters |= message.values
        for logger in self.loggers:
            if hasattr(logger, "log_hyperparams"):
                try:
                    logger.log_hyperparams(to_plain(self.hyperparameters))
                except (OSError, StorageError) as error:
                    self.tell(f"{type(logger).__name__} could not log the hyperparameters: {error}", "warning")
        self._later(self.write_record)

    # ---- checkpoints

    def _on_saved(self, rank: int, message: m.Saved) -> None:
        if message.world_size > self.world_size:
            self._give_up(message)
            return
        shares = self.saved.setdefault(message.directory, {})
        shares[rank] = message
        fitting = {rank: share for rank, share in shares.items() if share.world_size == message.world_size}
        if len(fitting) == message.world_size:
            del self.saved[message.directory]
            self._later(self._commit, message.directory, fitting)

    def _give_up(self, share: m.Saved) -> None:
        """The group has shrunk since: the share of a rank that is gone is missing for good. It is said once."""
        if share.directory != self._given_up:
            self._given_up = share.directory
            self.tell(
                f"the checkpoint of step {share.step} is lost: {share.world_size} workers had begun it, and "
                f"{self.world_size} are left. Training goes on; earlier checkpoints are whole.", "warning",
            )  # fmt: skip

    def _commit(self, directory: str, shares: dict[int, m.Saved]) -> None:
        assert self.version is not None
        first = shares[min(shares)]
        manifest = Manifest(
            step=first.step,
            epoch=first.epoch,
            attempt=self.attempt,
            world_size=first.world_size,
            files=tuple(file for rank in sorted(shares) for file in shares[rank].files),
            metrics=first.metrics,
            weights_only=first.weights_only,
            seed=self.record.get("seed"),
            carried=first.carried,
        )
        self._flush_journal()
        try:
            self._look_for_deletion()
            committed = store.commit(self.version.storage, directory, manifest)
            self.checkpoints = [c for c in self.checkpoints if c.path != committed.path] + [committed]
            self.ledger.note_commit()
            self._retain()
        except Superseded as error:
            self.superseded = error
        except Exception as error:
            self.tell(f"the checkpoint of step {first.step} is lost: {_describe(error)}", "warning")
        self.write_record()

    def _flush_journal(self) -> None:
        """The values before a checkpoint are on storage when it is: a run that goes on from it does not log them again.
        Where that fails, the journal keeps them and goes on trying."""
        try:
            if self.journal is not None:
                self.journal.flush()
        except Exception as error:
            self.tell(f"values before a checkpoint are not on storage yet: {_describe(error)}", "warning")

    def _look_for_deletion(self) -> None:
        if self.version is not None and self.record and is_deleted(self.version, self.record["started_at"]):
            self.checkpoints = store.list_checkpoints(self.version.storage)
            self.tell(describe_deletion(self.version), "warning")
            self.write_record()

    def _retain(self) -> None:
        options = self.config.checkpoint or Checkpointing()
        extra = retain(
            self.checkpoints, options.keep_best, options.keep_last, options.monitor, options.mode, self.protected
        )  # fmt: skip
        for checkpoint in extra:
            try:
                store.delete(checkpoint)
            except Exception as error:
                self.tell(f"a checkpoint that is not needed any more stays on storage: {_describe(error)}", "warning")
        gone = {checkpoint.path for checkpoint in extra}
        self.checkpoints = [c for c in self.checkpoints if c.path not in gone]

    def _on_save_failed(self, rank: int, message: m.SaveFailed) -> None:
        self.saved.pop(message.directory, None)
        self.tell(
            f"rank {rank} could not write its share of the checkpoint of step {message.step}: "
            f"{message.reason.rstrip('.')}. "
            + ("Earlier" if self.is_ending else "Training goes on; earlier") + " checkpoints are whole.", "warning",
        )  # fmt: skip

    @property
    def best(self) -> Checkpoint | None:
        options = self.config.checkpoint or Checkpointing()
        return best(self.checkpoints, options.monitor, options.mode)

    @property
    def last(self) -> Checkpoint | None:
        return max(self.checkpoints, key=lambda checkpoint: checkpoint.age_key, default=None)

    @property
    def goodput(self) -> dict[str, float]:
        """Seconds by what they went to."""
        first = self.outcome.finished.get(0)
        return self.ledger.read(first.seconds if first is not None else {})

    # ---- run.json

    def start(self, given: dict[str, Any]) -> None:
        """Writes the first run.json; `given` are facts to record beside the arguments."""
        previous = self.version.read_run() if self.version is not None else {}
        if self.is_follow_up:
            self.record = previous
            return
        self.record = {
            **previous,
            "name": self.config.name,
            "version": self.version.number if self.version is not None else None,
            "status": "running",
            "started_at": previous.get("started_at", self.began),
            "finished_at": None,
            "arguments": describe(self.config),
            "hyperparameters": previous.get("hyperparameters", {}),
            "attempts": [
                *previous.get("attempts", []),
                {"attempt": self.attempt, "started_at": self.began, "world_size": self.world_size},
            ],
            "packages": _package_versions(),
            "python": sys.version.split()[0],
            "git_commit": _git_commit(),
            "command": mask_command(sys.argv),
            **given,
        }  # fmt: skip
        self.write_record()

    def begin_generation(
        self, world_size: int, reason: str, gone: Collection[int] = (), last_step: int | None = None
    ) -> None:
        """The group is made anew after a failure, of as many ranks. `gone`: those that died or left; the others go on
        after step `last_step`."""
        self.world_size = world_size
        self._epoch_rows.begin_generation()
        self.wait_for_storage()
        self.saved.clear()
        self.outcome.finished.clear()
        if last_step is not None:
            self._regroup_rows(gone, last_step)
        if self.record:
            restarts = self.record.setdefault("restarts", [])
            restarts.append({"time": time.time(), "step": self.step, "world_size": world_size, "reason": reason})
        self.write_record()

    def _regroup_rows(self, gone: Collection[int], last_step: int) -> None:
        rows, incomplete = self.aggregator.regroup(self.world_size, gone, last_step)
        for row in rows:
            self._write_values(*row)
        if incomplete:
            self.tell(say_incomplete(incomplete, gone), "warning")

    def write_record(self) -> None:
        if self.version is None or not self.record or self.superseded is not None:
            return
        metrics, hyperparameters = dict(self.callback_metrics), dict(self.hyperparameters)  # may grow meanwhile
        if self.is_follow_up:
            self.record["metrics"] = {**self.record.get("metrics", {}), **to_plain(metrics)}
        else:
            self.record |= {
                "hyperparameters": {**self.record["hyperparameters"], **to_plain(hyperparameters)},
                "best_checkpoint": self.best.path if self.best else None,
                "last_checkpoint": self.last.path if self.last else None,
                "metrics": to_plain(metrics),
            }
        try:
            self.version.write_run(self.record)
            self._record_problem = ""
        except Exception as error:
            problem = f"run.json could not be written: {_describe(error)}"
            if problem != self._record_problem:  # it is written at every checkpoint, and one line is enough
                self._record_problem = problem
                self.tell(problem, "warning")

    def close(self, status: str) -> None:
        """Brings everything to storage. Called once, whatever happened."""
        self.wait_for_storage()
        self._check_superseded()
        if not self.is_follow_up:
            attempts = self.record.get("attempts") or [{}]
            attempts[-1]["duration_s"] = time.time() - self.began
            self.record |= {
                "status": status,
                "finished_at": time.time(),
                "duration_s": sum(attempt.get("duration_s", 0.0) for attempt in attempts),
                "goodput": self.goodput,
            }
        closers = [(type(logger).__name__, _closer(logger, status)) for logger in self.loggers]
        for name, close in [("a logger", self._flush), ("the journal", self._close_journal), *closers]:
            try:
                close()
            except (OSError, StorageError) as error:
                self.tell(f"what was logged is not all on storage: {error}", "warning")
            except Exception as error:  # of a logger of the user's: the run is over, and its record has to say so
                self.tell(f"what was logged is not all stored: {name} raised {_describe(error)}", "warning")
        self.write_record()
        self._writer.shutdown()

    def _flush(self) -> None:
        for step, epoch, moment, values in self.aggregator.flush():
            self._write_values(step, epoch, moment, values)
        if (error := self.take_logger_error()) is not None:
            raise error

    def _close_journal(self) -> None:
        if self.journal is not None:
            self.journal.close(merge=self.superseded is None)

    def _check_superseded(self) -> None:
        """A run that made no checkpoint since has not noticed yet."""
        if self.version is None or self.is_follow_up:
            return
        try:
            check_attempt(self.version.storage, self.attempt)
            self._look_for_deletion()
        except StorageError as error:
            self.superseded = error if isinstance(error, Superseded) else None
            self.tell(str(error), "warning")


def _describe(error: Exception) -> str:
    """A file system that the user made may raise anything."""
    return str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"


def _closer(logger: Any, status: str) -> Callable[[], None]:
    if hasattr(logger, "finalize"):
        return lambda: logger.finalize("success" if status != "failed" else "failed")
    return getattr(logger, "close", lambda: None)


def _package_versions() -> dict[str, str]:
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit of the working directory, read by git where there is one."""
    if not any(os.path.exists(os.path.join(parent, ".git")) for parent in _parents(os.getcwd())):
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _parents(path: str) -> list[str]:
    found = [path]
    while os.path.dirname(found[-1]) != found[-1]:
        found.append(os.path.dirname(found[-1]))
    return found
