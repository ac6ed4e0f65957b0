"""One run from the driver's side: version, workers, messages, and what comes out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from raylight.contract.config import Config
from raylight.contract.messages import BatchOutputs, FilesAwaited, Message, Trained
from raylight.contract.process_settings import read_settings
from raylight.contract.seeding import isolate_rng, last_seed, rng_state
from raylight.contract.task import Loaders, Task
from raylight.contract.user_error import beside, say
from raylight.driver.damage import set_aside_damaged
from raylight.driver.driver import Driver
from raylight.driver.group import Group
from raylight.driver.logger_feed import Logger
from raylight.driver.recovery import Recovery
from raylight.driver.restart import History
from raylight.driver.result import Result
from raylight.driver.saved_checkpoints import make_describer
from raylight.driver.watch import Watch
from raylight.launch.in_process import InProcessGroup
from raylight.launch.signals import stop_on_signal
from raylight.lightning_files import LightningFiles
from raylight.loading import Resume, find_resume, find_seed
from raylight.loggers.opening import describe_loggers, make_loggers
from raylight.report.console import Console
from raylight.report.gauges import GAUGES, Gauges
from raylight.report.output_streams import lasting_streams
from raylight.storage.checkpoints import Checkpoint, raise_fence, sweep_leftovers
from raylight.storage.fence import claim_attempt
from raylight.storage.filesystem import Storage
from raylight.storage.versions import Version, claim_version
from raylight.user.checkpoint_io import find_checkpoint_io, find_plugged_io
from raylight.user.logger import DummyLogger
from raylight.user.module import Module
from raylight.user.trainer_names import TrainerNames
from raylight.worker.returned import unpack_objects

Returned = Result | list[dict[str, float]] | list[object]
"""Of a fit; of validate and test, a dict for each loader; of predict, the outputs."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """A version that a trainer was asked for before its first run, and the loggers that write to it."""

    version: Version
    loggers: list[Logger]


def claim(config: Config) -> Claimed:
    """Claims the next version of a run, which the next run of that trainer will use."""
    version = claim_version(Storage(config.storage_path, config.storage_filesystem), config.name)
    return Claimed(version, make_loggers(config.logger, version.storage))


@dataclass(frozen=True, slots=True)
class Kept:
    """The checkpoints that a run has left."""

    checkpoints: list[Checkpoint]
    best: Checkpoint | None
    last: Checkpoint | None


class Execution:
    """A fit, validate, test or predict. `driver` and `result` are there for the trainer to read afterwards."""

    def __init__(
        self, trainer: TrainerNames, stage: str, module: Module, loaders: Loaders, previous: Result | None = None,
        claimed: Claimed | None = None, returns_predictions: bool = True, weights_only: bool | None = None,
    ):  # fmt: skip
        self.trainer, self.stage, self.module, self.loaders = trainer, stage, module, loaders
        self.config, self.callbacks, self.previous = trainer.config, list(trainer.callbacks), previous
        self.claimed, self.returns_predictions, self.weights_only = claimed, returns_predictions, weights_only
        self._drew_seed = False
        self.driver: Driver | None = None
        self.facts: dict[str, Any] = {}
        """Facts that rank 0 in another process has sent, by the names of `RunView`."""
        self.result: Result | None = None
        self.history = History()

    def run(self, ckpt_path: object, verbose: bool) -> Returned:
        if self.stage == "fit" and os.environ.get("RAYLIGHT_REPLAY"):
            self._replay()
        with lasting_streams():
            return self._run(ckpt_path, verbose)

    def _run(self, ckpt_path: object, verbose: bool) -> Returned:
        self.start(ckpt_path)
        assert self.driver is not None
        with stop_on_signal(self.group.request, self.driver.tell) as signals:
            try:
                for _ in self.messages():
                    pass
                signals.close()
                returned = self.finish(verbose)
                self._give_back()
                return returned
            except BaseException as error:
                signals.close()
                with beside(error, "halting the workers"):
                    self.group.halt()
                self.driver.record.note_error(_say_first_line(error))
                with beside(error, "closing the run"):
                    self._close(_status_after(error))
                with beside(error, "giving the module back"):
                    self._give_back()
                raise

    def _replay(self) -> None:
        """In a process that `raylight replay` has started, for the run that it is about: ends there."""
        from raylight.replay import is_wanted, replay

        if is_wanted(self.config.name):
            replay(self.module, self.loaders, self.trainer)

    def start(self, ckpt_path: object, facts: Mapping[str, object] | None = None) -> None:
        """The workers and, on storage, the version; nothing is trained yet. `facts` go to run.json."""
        storage = Storage(self.config.storage_path, self.config.storage_filesystem)
        resume = find_resume(
            ckpt_path, storage, self.config.name, self.previous,
            stage=self.stage, filesystem=self.config.storage_filesystem,
            plugin=find_plugged_io(self.config.plugins), weights_only=self.weights_only,
        )  # fmt: skip
        choose = cache(lambda: self._choose_version(storage, resume))  # done when it is asked for first
        self.group = self._start_group(lambda: _make_label(self.config, choose()[0]))
        try:
            self.task, self.console = self._prepare(self.group, resume, *choose(), facts or {})
        except BaseException as error:
            with beside(error, "ending the run that had not begun"):
                self.group.halt()  # else it would stay in use
                if self.driver is not None and self.driver.record.has_begun:
                    self.driver.close(_status_after(error))
            raise

    def abandon(self, status: str) -> None:
        """Ends a run whose messages nobody wants any more, and leaves the workers ready for another."""
        self.group.halt()
        self.group.wait()
        self._close(status)
        self._give_back()

    def _close(self, status: str) -> None:
        assert self.driver is not None
        self.driver.close(status)
        self.console.close(None)

    def _give_back(self) -> None:
        self.module.trainer = None
        if self.module.device.type != "cpu":
            self.module.cpu()

    def _prepare(
        self, group: Group, resume: Resume, version: Version | None, attempt: int, facts: Mapping[str, object]
    ) -> tuple[Task, Console]:
        """run.json, loggers and console; and the task for the workers."""
        config = self.config
        if attempt and version is not None:
            raise_fence(version.storage, attempt)
            sweep_leftovers(version.storage)
        loggers: Sequence[Logger] = []
        if self.claimed is not None and version is self.claimed.version:
            loggers = self.claimed.loggers
        elif config.fast_dev_run:
            loggers = [DummyLogger()]
        else:
            loggers = make_loggers(config.logger, version.storage if version is not None else None)
        console = Console(
            config.enable_progress_bar,
            world_size=group.world_size,
            max_epochs=config.max_epochs,
            max_steps=config.max_steps,
            max_time_s=config.max_time_s,
        )
        protected = resume.checkpoint.path if resume.checkpoint is not None else None
        is_follow_up = self.stage != "fit" and version is not None and bool(version.read_run())
        driver = self.driver = Driver(
            version,
            config,
            group.world_size,
            [console],
            loggers,
            attempt,
            protected,
            is_follow_up,
            LightningFiles(find_checkpoint_io(config.plugins), type(self.module)),
            make_describer(self.callbacks),
        )
        if self.stage == "fit" and not group.is_local:
            driver.add_sink(_make_gauges(driver))
        seed = resume.seed if resume.seed is not None else self._choose_seed(resume)
        driver.start({"seed": seed, "stage": self.stage, "resumed_from": protected, **facts})
        self.module.trainer = self.trainer  # a graph is traced through all properties, and loggers may read it
        driver.loggers.open(self.module)
        self.module.trainer = None
        if resume.notice:
            driver.tell(resume.notice)
        if attempt:
            driver.redo_from(resume.checkpoint.step if resume.checkpoint is not None else 0)
            if resume.checkpoint is not None:
                driver.take_over(resume.checkpoint)
                driver.make_missing_files(resume.checkpoint)
        has_summary = any(type(callback).__name__.endswith("ModelSummary") for callback in self.callbacks)
        if self.stage == "fit" and config.enable_model_summary and not has_summary:
            console.show_model(self.module)
        task = Task(
            stage=self.stage,
            module=self.module,
            loaders=self.loaders,
            config=replace(config, logger=bool(config.logger), storage_filesystem=None),
            callbacks=self.callbacks,
            trainer=self.trainer,
            version_path=version.path if version is not None else "",
            files=version.storage if version is not None else None,
            seed=seed,
            loggers=describe_loggers(driver.loggers, group.is_local),
            checkpoint=resume.checkpoint,
            file=resume.file,
            runs_code=self.weights_only is False,
            weights_only=self.stage != "fit",
            attempt=attempt,
            trained=self._find_trained(resume),
            returns_module=not group.is_local,
            returns_predictions=self.returns_predictions,
            settings={} if group.is_local else read_settings(),
            rng=None if group.is_local else rng_state(with_gpu=False),
            takes_new_options=resume.takes_new_hyperparameters,
            label=_make_label(config, version),
            stamp=driver.record.started_at,
        )
        return task, console

    def messages(self) -> Iterator[tuple[int, Message]]:
        """The messages of the workers, once the driver has handled them, until all are done. After a failure the group
        goes on as driver/recovery.py says."""
        driver, group, task = self.driver, self.group, self.task
        assert driver is not None
        watch = Watch(self.config, group, driver, self.stage)
        recovery = Recovery(self.config, group, driver, task, watch)
        self.history = recovery.history
        messages = group.run(task)
        group.follow(watch.look)
        while True:
            for rank, message in messages:
                driver.handle(rank, message)
                watch.see(message)
                if isinstance(message, FilesAwaited) and driver.make_awaited_files():
                    group.resume()
                yield rank, message
            failures = driver.outcome.take_failures()
            if not failures:
                return
            messages = recovery.go_on(failures)

    # ---- before

    def _start_group(self, label: Callable[[], str]) -> Group:
        if self.config.num_workers == 0:
            return InProcessGroup(self.config)
        from raylight.launch.ray_actors import acquire_group

        return acquire_group(self.config, label=label, tell=print)

    def _choose_version(self, storage: Storage, resume: Resume) -> tuple[Version | None, int]:
        """A fit claims a version of its own, or is the next attempt of the one it continues; what follows a fit of
        the same trainer writes beside it."""
        if self.config.fast_dev_run or self.stage == "predict":
            return None, 0
        if self.stage == "fit":
            if resume.version is not None:
                set_aside_damaged(resume.version)
                is_new = resume.checkpoint is None and not resume.version.read_run()
                return resume.version, 0 if is_new else claim_attempt(resume.version.storage)
            return self._claim(storage), 0
        if self.previous is not None and self.previous.version is not None:
            set_aside_damaged(self.previous.version)
            return self.previous.version, 0
        return self._claim(storage), 0

    def _claim(self, storage: Storage) -> Version:
        return self.claimed.version if self.claimed is not None else claim_version(storage, self.config.name)

    def _find_trained(self, resume: Resume) -> tuple[int, int]:
        """Steps and epochs that the evaluated weights were trained for: the place of their metrics in the curves."""
        if resume.checkpoint is not None:
            return resume.checkpoint.step, resume.checkpoint.epoch
        if resume.file is not None or self.previous is None:
            return resume.trained
        return self.previous.num_steps, self.previous.num_epochs

    def _choose_seed(self, resume: Resume) -> int:
        """The caller's, else that of the run gone on from, whose epoch may be half done; else one from torch's
        generator, so that a script which seeds torch gets the same order of samples each time. What the run draws, it
        draws as if this had not been drawn."""
        seed = self.config.seed if self.config.seed is not None else last_seed()
        if seed is None and self.stage == "fit":
            seed = resume.file_seed if resume.file is not None else find_seed(resume.checkpoint)
        if seed is not None:
            return seed
        self._drew_seed = True
        with isolate_rng():
            return _draw_seed()

    # ---- after

    @property
    def was_interrupted(self) -> bool:
        """By a signal, or because it failed."""
        return self.result is None or self.result.status == "interrupted" if self.stage == "fit" else False

    @property
    def trained(self) -> tuple[int, int]:
        """Steps and epochs that the evaluated weights were trained for."""
        return self.task.trained

    @property
    def kept(self) -> Kept:
        assert self.driver is not None
        shelf = self.driver.shelf
        return Kept(shelf.checkpoints, shelf.best, shelf.last)

    def _status(self) -> str:
        assert self.driver is not None
        statuses = self.driver.outcome.statuses
        return next((status for status in ("interrupted", "stopped") if status in statuses), "finished")

    def finish(self, verbose: bool) -> Returned:
        """Returns what the caller gets, after the last message."""
        driver, console, status = self.driver, self.console, self._status()
        assert driver is not None
        finished = driver.outcome.first
        assert finished is not None
        if self._drew_seed:
            _draw_seed()  # else the next run would get the same
        driver.finish(finished)
        if self.stage == "fit":
            driver.close(status)
            self._take_back(finished.trained)
            self.result = Result(
                status=status,
                metrics=driver.callback_metrics,
                path=driver.version.path if driver.version is not None else None,
                best_checkpoint=driver.shelf.best,
                last_checkpoint=driver.shelf.last,
                checkpoints=driver.shelf.checkpoints,
                num_steps=finished.step,
                num_epochs=finished.epoch,
                num_restarts=self.history.num_restarts,
                goodput=driver.goodput,
                version=driver.version,
            )
            console.close(self.result, with_tensorboard=bool(self.config.logger))
            return self.result
        driver.close(status)
        console.close(None)
        if self.stage == "predict":
            shares = driver.outcome.take_outputs()
            return _merge_predictions(shares) if self.returns_predictions else []
        results = list(finished.results)
        if verbose:
            console.show_results(self.stage, results)
        return results

    def _take_back(self, trained: Trained | None) -> None:
        """The caller's own objects become what rank 0's were at the end."""
        if trained is None:  # they were used themselves
            return
        assert self.driver is not None
        self.facts = trained.facts
        try:
            unpack_objects(trained.objects, self.module, self.callbacks, self.loaders.data_module, self.trainer)
        except Exception as error:
            text = f"attributes of module, callbacks and data module were not brought back: {error!r}"
            self.driver.tell(text, "warning")
        self.module.load_state_dict(trained.weights)


def _say_first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {say(error)}".splitlines()[0]


def _status_after(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _draw_seed() -> int:
    return int(torch.randint(0, 2**31 - 1, ()).item())


def _make_label(config: Config, version: Version | None) -> str:
    """The name of the run's actors in Ray's dashboard."""
    return f"{config.name}:v{version.number}" if version is not None else config.name


def _make_gauges(driver: Driver) -> Gauges:
    """For Prometheus, to which Ray hands the values on."""
    from raylight.launch.ray_metrics import open_gauges

    version = str(driver.version.number) if driver.version is not None else ""
    return Gauges(driver, open_gauges(GAUGES, {"run": driver.config.name, "version": version}))


def _merge_predictions(shares: list[BatchOutputs]) -> list[object]:
    """Each loader's outputs in the order of its batches; for one loader that list alone."""
    num_loaders = len(shares[0])
    merged: list[list[object]] = []
    for loader in range(num_loaders):
        pairs = sorted((pair for share in shares for pair in share[loader]), key=lambda pair: pair[0])
        merged.append([output for _, output in pairs])
    return merged[0] if num_loaders == 1 else [*merged]
