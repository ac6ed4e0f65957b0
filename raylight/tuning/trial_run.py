"""TrialRun: one trial from the driver's side, a fit that stands still between two of its results."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TypeGuard

from raylight.arguments import checks
from raylight.arguments.resolving import resolve
from raylight.arguments.rules import as_list
from raylight.contract.config import Config, to_plain
from raylight.contract.errors import CheckpointCorrupt, InvalidArguments, MissingFile
from raylight.contract.layout import CHECKPOINTS
from raylight.contract.messages import (
    Died,
    Failure,
    Hyperparameters,
    Message,
    Paused,
    PeerLost,
    Progress,
    StageFinished,
    StageStarted,
)
from raylight.contract.requests import Request
from raylight.contract.user_error import beside
from raylight.driver.driver import Driver
from raylight.driver.run_record import JsonObject
from raylight.execution import Execution
from raylight.loading import Pointer, Resume
from raylight.storage.checkpoints import Checkpoint, delete, list_checkpoints, read_checkpoint, verify
from raylight.storage.fence import newest_attempt
from raylight.storage.filesystem import Storage
from raylight.storage.summaries import read_run_or_status
from raylight.storage.versions import Version, claim_version, open_version
from raylight.trainer import find_available
from raylight.tuning.recipe import Made
from raylight.tuning.trial_notes import Notes
from raylight.user.module import Module
from raylight.user.trainer_names import TrainerNames

TuneResult = dict[str, object]
"""One result of a trial, as Tune takes it: metrics, counts and paths by name."""
NUM_PINNED = 2
"""How many checkpoints that Tune has learnt of are kept besides the best and the last: other trials may clone them."""


class TrialRun:
    """A trial that was begun before, by a process that is gone or on an actor that has another trial now, goes on in
    its own version. Raises InvalidArguments if the configuration cannot work."""

    def __init__(
        self, made: Made, values: Mapping[str, object], trial_id: str, name: str, notes: Notes,
        metric: str | None = None,
    ):  # fmt: skip
        self.values, self.trial_id, self.name, self.notes, self.metric = dict(values), trial_id, name, notes, metric
        callbacks = as_list(made.arguments.get("callbacks"))
        self.config: Config = resolve(made.arguments, find_available(made.arguments))
        mistakes = checks.check_run("fit", made.module, made.loaders, self.config, callbacks)
        if mistakes:
            raise InvalidArguments(mistakes)
        self.validates = has_validation(made, self.config)
        self.execution = Execution(TrainerNames(self.config, callbacks), "fit", made.module, made.loaders)
        self.storage = Storage(self.config.storage_path, self.config.storage_filesystem)
        self.is_over = False
        self._measured: int | None = None  # step of a validation after which training has not gone on yet
        self._results: list[TuneResult] = []  # that Tune has not been given yet
        self._is_pausing = self._has_told = False
        self._pinned: list[str] = []

    # ---- beginning

    def begin(self, pointer: Pointer | None) -> None:
        """`pointer`: the checkpoint that Tune restores: this trial's own, or that of a trial that it clones."""
        version = self._find_version()
        version.set_aside_damaged_run()
        record = version.read_run()
        if pointer is None and record and (record.get("trial") or {}).get("config") != to_plain(self.values):
            # Tune was killed before it noted this trial, and has drawn another under its name.
            version, record = self._claim_version(), {}
        facts: JsonObject = {"clones": [], "result_steps": [], **(record.get("trial") or {})}
        source, is_clone = self._find_source(version, facts, pointer)
        step = source.step if source is not None else 0
        if is_clone and source is not None and pointer is not None:
            for checkpoint in list_checkpoints(version.storage):  # those steps are made again
                if checkpoint.step >= step:
                    delete(checkpoint)
            clone = {
                "trial": pointer.trial_id, "checkpoint": source.path, "step": step, "time": time.time(),
                "attempt": newest_attempt(version.storage) + 1, "config": to_plain(self.values),
            }  # fmt: skip
            facts["clones"] = [*facts["clones"], clone]
            cloned = read_run_or_status(open_version(self.storage, self.config.name, pointer.version))
            facts["result_steps"] = (cloned.get("trial") or facts).get("result_steps", [])
        is_changed = "config" in facts and facts["config"] != to_plain(self.values)
        self.facts = facts | {
            "id": self.trial_id,
            "name": self.name,
            "config": to_plain(self.values),
            "result_steps": [done for done in facts["result_steps"] if done <= step],
        }
        self._epoch = source.epoch if source is not None else 0
        resume = Resume(source, version, record.get("seed"), takes_new_hyperparameters=is_clone or is_changed)
        self.execution.start(resume, {"trial": self.facts})
        if not is_clone:
            self.driver.take_over_record(record.get("metrics", {}))
        self.driver.handle(0, Hyperparameters(self.values))
        self._messages = self.execution.messages()

    @property
    def driver(self) -> Driver:
        assert self.execution.driver is not None, "begin first"
        return self.execution.driver

    def _find_version(self) -> Version:
        """This trial's own version, claimed if it has none yet."""
        number = self.notes.read().get("version")
        return open_version(self.storage, self.config.name, number) if number is not None else self._claim_version()

    def _claim_version(self) -> Version:
        version = claim_version(self.storage, self.config.name)
        self.notes.write(version=version.number, name=self.name)
        return version

    def _find_source(
        self, version: Version, facts: JsonObject, pointer: Pointer | None
    ) -> tuple[Checkpoint | None, bool]:
        """The checkpoint to begin from, and whether it is another trial's."""
        last_clone = facts["clones"][-1] if facts["clones"] else None
        is_foreign = pointer is not None and pointer.trial_id != self.trial_id
        if is_foreign:
            assert pointer is not None
            asked = {"trial": pointer.trial_id, "config": to_plain(self.values)}
            if last_clone is None or not asked.items() <= last_clone.items():
                return self._open(pointer), True
        since = last_clone["attempt"] if last_clone is not None else 0
        found = _newest_whole([c for c in list_checkpoints(version.storage) if c.manifest.attempt >= since])
        if found is None and is_foreign:
            assert pointer is not None
            return self._open(pointer), True
        return found, False

    def _open(self, pointer: Pointer) -> Checkpoint:
        """The checkpoint that a pointer names; if it is gone, the newest of that trial, which has gone on since."""
        version = open_version(self.storage, self.config.name, pointer.version)
        try:
            named = [read_checkpoint(version.storage.child(CHECKPOINTS, pointer.checkpoint))]
        except (MissingFile, CheckpointCorrupt):
            named = []
        found = _newest_whole(named) or _newest_whole(list_checkpoints(version.storage))
        if found is None:
            raise MissingFile(
                f"trial {self.name} is to go on from {pointer.path}, and {version.path} has no checkpoint: "
                "a scheduler that clones trials needs them; leave checkpoint=False out"
            )
        return found

    # ---- results

    def next_result(self) -> TuneResult | None:
        """Trains until the next validation is over and its checkpoint on storage; then the workers stand still. None:
        training has ended since the last result, and nothing more was measured."""
        try:
            if not self._results and not self.is_over:
                self._train()
            if not self._results and not self._has_told:
                self._results.append(self._read_result(self.driver.step))
            self._has_told = True
            return self._results.pop(0) | self._where() if self._results else None
        except Exception as error:
            self.driver.record.note_error(f"{type(error).__name__}: {error}".splitlines()[0])
            with beside(error, "closing the run"):
                self._abandon("failed")
            raise

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to come."""
        return self.is_over and not self._results

    def _train(self) -> None:
        """Until all ranks stand still, or the run is over."""
        group, paused = self.execution.group, set[int]()
        group.resume()
        for rank, message in self._messages:
            if rank == 0:
                self._note(message)
            if isinstance(message, Failure | Died | PeerLost):  # the ranks that go on know nothing of a pause
                paused, self._is_pausing = set(), False
            if self._results and not self._is_pausing and _is_training(message):
                self._is_pausing = True
                group.pause()
            if isinstance(message, Paused):
                paused.add(rank)
                if len(paused) >= group.world_size:
                    self._is_pausing = False
                    self.driver.wait_for_storage()
                    return
        self.is_over = True
        if self._measured is not None:
            self._results.append(self._read_result(self._measured))
        self.execution.finish(verbose=False)

    def _note(self, message: Message) -> None:
        steps, stage = self.facts["result_steps"], "validate" if self.validates else "train"
        if isinstance(message, StageFinished):
            if message.stage == "train":
                self._epoch = message.epoch
            if message.stage == stage and message.step not in steps:
                self._measured = message.step
                steps.append(message.step)
        elif self._measured is not None and _trains_on(message, self._measured):  # the epoch's end has been heard
            self._results.append(self._read_result(self._measured))

    def _read_result(self, step: int) -> TuneResult:
        values, metric = self.driver.callback_metrics, self.metric
        if metric is not None and metric not in values:
            raise InvalidArguments(checks.say_unknown_metric(metric, values, "raylight.sweep"))
        self._measured = None
        number = max(sum(done <= step for done in self.facts["result_steps"]), 1)
        return {**values, "epoch": self._epoch, "step": step, "training_iteration": number}

    def _where(self) -> TuneResult:
        version, best = self.driver.version, self.driver.shelf.best
        assert version is not None
        where: TuneResult = {"version": version.path, "best_checkpoint": best.path if best is not None else None}
        if best is not None and self.metric in best.metrics:
            where[f"best_{self.metric}"] = best.metrics[self.metric]
        return where

    # ---- what Tune asks for

    def point_to_checkpoint(self) -> Pointer | None:
        """The newest checkpoint, which is kept for a while; one of this moment is made if that is older than the
        last result. None: this run makes no checkpoints."""
        driver, reported = self.driver, max(self.facts["result_steps"], default=0)
        newest = driver.shelf.last
        is_old = newest is None or newest.step < reported
        if is_old and self.config.checkpoint is not None and not self.is_over:
            self.execution.group.request(Request.SAVE)
            self._is_pausing = True
            self.execution.group.pause()
            self._train()
        last = driver.shelf.last
        if last is None or driver.version is None:
            return None
        self._pinned = [*(path for path in self._pinned if path != last.path), last.path][-NUM_PINNED:]
        driver.shelf.pin(self._pinned)
        return Pointer(self.trial_id, driver.version.number, last.name, last.path)

    def end(self, status: str) -> None:
        """Stops the workers where they are and closes the version; nothing if it is over. They can be used again."""
        if not self.is_over:
            self._abandon(status)

    def _abandon(self, status: str) -> None:
        if not self.is_over:
            self.is_over = True
            self.execution.abandon(status)


def has_validation(made: Made, config: Config) -> bool:
    """Whether results come at validations; else they come at the end of each training epoch."""
    from raylight.user.data_module import DataModule

    if not config.limit_val_batches or not checks.is_overridden(made.module, "validation_step", Module):
        return False
    owners = ((made.module, Module), (made.loaders.data_module, DataModule))
    hooks = (owner is not None and checks.is_overridden(owner, "val_dataloader", base) for owner, base in owners)
    return made.loaders.validate is not None or any(hooks)


def _is_training(message: Message) -> TypeGuard[StageStarted | Progress]:
    return isinstance(message, StageStarted | Progress) and message.stage == "train"


def _trains_on(message: Message, step: int) -> bool:
    """Whether training has left this step behind, and with it the end of an epoch that the step may be."""
    return _is_training(message) and (isinstance(message, StageStarted) or message.step > step)


def _newest_whole(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    return next((c for c in reversed(checkpoints) if not c.manifest.weights_only and not verify(c)), None)
