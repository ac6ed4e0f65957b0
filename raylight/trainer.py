"""Trainer and fit, validate, test, predict: from arguments to a Result."""

# ruff: noqa: PT028  (`test` is no test of pytest's)

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Never, Unpack

import torch

from raylight.arguments import checks
from raylight.arguments.resolving import resolve
from raylight.arguments.rules import as_list
from raylight.arguments.scale import Available
from raylight.arguments.signatures import KeywordDoc, find_given, passes_on_keywords_of
from raylight.arguments.trainer_arguments import (
    EvaluationArguments,
    NumWorkers,
    Precision,
    TrainerArguments,
)
from raylight.contract.config import DDP, Checkpointing, Config, FilePath, Filesystem
from raylight.contract.durations import Duration
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Loader, Output, Value
from raylight.contract.task import Loaders
from raylight.contract.user_error import beside
from raylight.user.callback import Callback
from raylight.user.checkpoint_io import find_checkpoint_io
from raylight.user.checkpoint_reader import CheckpointPath
from raylight.user.data_module import DataModule
from raylight.user.logger import TakesMetrics
from raylight.user.module import Module
from raylight.user.profilers import Profiler
from raylight.user.run_view import Record, WorkersRecord, facts_of
from raylight.user.states import TrainerStatus
from raylight.user.trainer_names import TrainerNames

if TYPE_CHECKING:
    from raylight.driver.result import Result
    from raylight.driver.run import Run
    from raylight.execution import Claimed, Execution, Kept

QUIET: dict[str, Value] = {
    "fast_dev_run": 1, "checkpoint": None, "enable_progress_bar": False, "enable_model_summary": False,
    "profiler": None, "max_restarts": 0, "min_steps": None, "min_epochs": None, "max_time_s": None,
    "log_every_n_steps": 0,
}  # fmt: skip
"""Fields of the configuration of a run that leaves nothing."""


class Trainer(TrainerNames):
    """Lightning's Trainer over raylight, and what hooks receive as `trainer`: in this process this very object, on a
    worker one of the same class.

    Raises InvalidArguments with all mistakes at once, and NotEnoughResources if more was asked for than there is. None
    stands for an argument's default, except in `check_val_every_n_epoch`. Each argument is documented below its field
    in raylight.contract.config.Config; `help(raylight.Trainer)` shows that here.
    """

    _stays = TrainerNames._stays | {"arguments", "result", "_claimed", "_kept"}

    def __init__(
        self,
        *,
        num_workers: NumWorkers | None = "auto", use_gpu: bool | None = None,
        resources_per_worker: Mapping[str, float] | None = None, strategy: str | DDP = "auto",
        devices: int | str | Sequence[int] = "auto", gpus: int | str | Sequence[int] | None = None,
        num_nodes: int = 1, accelerator: str = "auto",
        max_epochs: int | None = None, min_epochs: int | None = None, max_steps: int = -1,
        min_steps: int | None = None, max_time: Duration | None = None,
        limit_train_batches: int | float | None = 1.0, limit_val_batches: int | float | None = 1.0,
        limit_test_batches: int | float | None = 1.0, limit_predict_batches: int | float | None = 1.0,
        overfit_batches: int | float = 0.0, fast_dev_run: int | bool = False,
        val_check_interval: int | float | Duration | None = 1.0, check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = 2, reload_dataloaders_every_n_epochs: int = 0,
        precision: Precision | None = None, accumulate_grad_batches: int = 1, global_batch_size: int | None = None,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] | None = "norm",
        deterministic: bool | Literal["warn"] | None = False, benchmark: bool | None = None,
        sync_batchnorm: bool = False, detect_anomaly: bool = False, inference_mode: bool = True,
        seed: int | None = None, use_distributed_sampler: bool = True,
        storage_path: FilePath | None = None, default_root_dir: FilePath | None = None,
        storage_filesystem: Filesystem = None,
        name: str = "default", checkpoint: bool | Checkpointing | Mapping[str, Value] | None = None,
        enable_checkpointing: bool | None = None,
        logger: bool | TakesMetrics | Sequence[TakesMetrics] | None = True, log_every_n_steps: int | None = 50,
        enable_progress_bar: bool | None = True, enable_model_summary: bool | None = True,
        barebones: bool = False, profiler: str | Profiler | None = None,
        max_restarts: int = 3, hang_timeout_s: float | None = None, replacement_timeout_s: float = 60.0,
        num_standby: int | None = None,
        callbacks: Callback | Sequence[Callback] | None = None, plugins: Value = None,
        **unknown: Never,  # for a type checker there is none; here they become one error with all other mistakes
    ) -> None:  # fmt: skip
        arguments = find_given(Trainer, locals()) | unknown
        super().__init__(resolve(arguments, find_available(arguments)), as_list(arguments.get("callbacks")))
        self.arguments = arguments
        self.result: Result | None = None
        self._claimed: Claimed | None = None
        self._kept: Kept | None = None

    # ---- what to do

    def fit(
        self,
        model: Module,
        train_dataloaders: Loader | DataModule = None,
        val_dataloaders: Loader = None,
        datamodule: DataModule | None = None,
        ckpt_path: CheckpointPath = None,
        weights_only: bool | None = None,
    ) -> Result:
        """Trains `model` and returns a Result; afterwards `model` holds the trained weights, on the CPU.

        `ckpt_path`: None starts a new version; "last" continues the newest version of this run, or
        starts one if there is none; "best" or a checkpoint continue from there in a new version: its path or URI, a
        Checkpoint, or a file in Lightning's format. No checkpoint is read in a way that could execute code, here and
        below, unless `weights_only` is False.
        """
        if isinstance(train_dataloaders, DataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        loaders = Loaders(train=train_dataloaders, validate=val_dataloaders, data_module=datamodule)
        result: Result = self._execute("fit", model, loaders, ckpt_path, weights_only)
        return result

    def validate(
        self,
        model: Module | None = None,
        dataloaders: Loader | DataModule = None,
        ckpt_path: CheckpointPath = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """One dict of metrics for each loader, exact for any number of workers."""
        return self._evaluate("validate", model, dataloaders, datamodule, ckpt_path, weights_only, verbose)

    def test(
        self,
        model: Module | None = None,
        dataloaders: Loader | DataModule = None,
        ckpt_path: CheckpointPath = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """As `validate`, with test_step and the test loaders."""
        return self._evaluate("test", model, dataloaders, datamodule, ckpt_path, weights_only, verbose)

    def predict(
        self,
        model: Module | None = None,
        dataloaders: Loader | DataModule = None,
        datamodule: DataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: CheckpointPath = None,
        weights_only: bool | None = None,
    ) -> list[Output]:
        """The return values of predict_step, one for each batch, on the CPU, in dataset order; a list of such lists if
        there are several loaders. With `return_predictions=False` the list is empty, and at most one batch is held."""
        returns = return_predictions is not False
        return self._evaluate(
            "predict", model, dataloaders, datamodule, ckpt_path, weights_only, returns_predictions=returns
        )

    def _evaluate(
        self, stage: str, model: Module | None, dataloaders: Loader | DataModule, datamodule: DataModule | None,
        ckpt_path: CheckpointPath, weights_only: bool | None, verbose: bool = True, returns_predictions: bool = True,
    ) -> list[Value]:  # fmt: skip
        if isinstance(ckpt_path, DataModule):
            raise InvalidArguments(f"{stage}: ckpt_path is a data module; Lightning's order is dataloaders, ckpt_path, "
                                   f"verbose, datamodule: pass datamodule=...")  # fmt: skip
        if isinstance(dataloaders, DataModule):
            dataloaders, datamodule = None, dataloaders
        loaders = Loaders(data_module=datamodule)
        setattr(loaders, stage, dataloaders)
        found: list[Value] = self._execute(stage, model, loaders, ckpt_path, weights_only, verbose, returns_predictions)
        return found

    # ---- one run

    def _execute(
        self, stage: str, model: Module | None, loaders: Loaders, ckpt_path: CheckpointPath,
        weights_only: bool | None, verbose: bool = True, returns_predictions: bool = True,
    ) -> Value:  # fmt: skip
        from raylight.execution import Execution

        if model is None and ckpt_path is None and self.result is not None and self.result.best_checkpoint:
            ckpt_path = "best"
        if ckpt_path == "best":
            ckpt_path = getattr(super().checkpoint_callback, "best_model_path", "") or "best"
        module = model if model is not None else self.lightning_module
        if module is None:
            raise InvalidArguments(f"{stage} needs a model: pass one, or call fit first")
        if mistakes := checks.check_run(stage, module, loaders, self.config, self.callbacks):
            raise InvalidArguments(mistakes)
        if ckpt_path is None:
            for callback in self.callbacks:
                if hasattr(callback, "prepare_run"):
                    callback.prepare_run(self, stage, module, loaders)
        execution = Execution(
            self, stage, module, loaders, self.result, self._claimed, returns_predictions, weights_only
        )
        self._claimed = None
        try:
            returned = execution.run(ckpt_path, verbose)
        except BaseException as error:
            with beside(error, "filling the callbacks"):
                self._remember(execution)
            raise
        self._remember(execution)
        return returned

    def rehearse(
        self, stage: str, model: Module, loaders: Loaders, callbacks: Sequence[Callback], changes: dict[str, Value]
    ) -> None:
        """Runs `stage` for the sake of trying, with these callbacks alone and with fields of the configuration
        changed. Nothing is written to storage, and this trainer remembers nothing."""
        trial = copy.copy(self)
        TrainerNames.__init__(trial, replace(self.config, **(QUIET | changes)), list(callbacks))
        trial.result = trial._claimed = trial._kept = None
        trial._execute(stage, model, loaders, None, None, verbose=False, returns_predictions=False)

    def _remember(self, execution: Execution) -> None:
        """Keeps what a run leaves for the caller to read."""
        if execution.driver is None:
            return
        if execution.stage == "fit":
            self.result, self._kept = execution.result or self.result, execution.kept
        facts = self._collect_facts(execution, execution.driver)
        self.follow(Record(**facts) if execution.group.is_local else WorkersRecord(**facts), execution.stage)

    def _collect_facts(self, execution: Execution, driver: Run) -> dict[str, Value]:
        """The end of a run by the names of `Record`: live objects if it was in this process, else what workers sent."""
        view, given = self._view, execution.loaders
        step, epoch = (driver.step, driver.epoch) if execution.stage == "fit" else execution.trained
        found = facts_of(view) if execution.group.is_local else execution.facts | {
            "train_dataloader": given.train,
            "val_dataloaders": given.validate,
            "test_dataloaders": given.test,
            "predict_dataloaders": given.predict,
        }  # fmt: skip
        return found | {
            "module": execution.module,
            "datamodule": given.data_module,
            "callbacks": execution.callbacks,
            "loggers": driver.loggers.all,
            "stage": None,
            "status": TrainerStatus.INTERRUPTED if execution.was_interrupted else TrainerStatus.FINISHED,
            "log_dir": driver.version.path if driver.version is not None else view.log_dir,
            "callback_metrics": {name: torch.tensor(value) for name, value in driver.callback_metrics.items()},
            "logged_metrics": {name: torch.tensor(value) for name, value in driver.logged_metrics.items()},
            "global_step": step,
            "current_epoch": epoch,
        }

    # ---- names that can be read before a run, too

    @property
    def loggers(self) -> list[Value]:  # type: ignore[override]
        """The loggers; reading them before a fit makes them and the version's directory at once."""
        self._claim()
        return self._view.loggers

    @property
    def log_dir(self) -> str | None:  # type: ignore[override]
        """The version directory, as path or URI; reading it before a fit claims it at once. None if nothing is
        written."""
        self._claim()
        return self._view.log_dir

    def _claim(self) -> None:
        """Claims the version that the next run will use, unless there was a run already."""
        if self._fn is None and self._claimed is None and not self.config.fast_dev_run:
            from raylight.execution import claim

            claimed = self._claimed = claim(self.config)
            self._view = Record(
                callbacks=self.callbacks, loggers=claimed.loggers, log_dir=claimed.version.path,
                accumulate_grad_batches=self.config.accumulate_grad_batches,
            )  # fmt: skip

    @property
    def checkpoint_callback(self) -> Value:
        """The first ModelCheckpoint among the callbacks. If none was passed, one with the paths of raylight's own
        checkpoints."""
        from raylight.callbacks import ModelCheckpoint

        found = super().checkpoint_callback
        if found is None and self.config.checkpoint is not None:
            found = ModelCheckpoint()
            if self._kept is not None:
                found.take_kept(self._kept.best, self._kept.last)
        return found

    def save_checkpoint(self, filepath: FilePath, weights_only: bool = False, storage_options: Value = None) -> None:
        """Writes one file, at a path or a URI, whole or not at all; `torch.load` opens it, and Lightning goes on from
        it. In a hook it holds the present state, as `TrainerNames.save_checkpoint` says; after a fit, the state at its
        end. With `weights_only` optimizers, schedulers and callbacks are left out."""
        from raylight.worker.checkpoint.lightning_file import make_from_saved

        if self.state.status is TrainerStatus.RUNNING:
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        if self.result is None or self.result.last_checkpoint is None:
            raise InvalidArguments("save_checkpoint: there is no checkpoint yet; call fit first, with checkpoint=True")
        owner = type(self.lightning_module) if self.lightning_module is not None else object
        checkpoint = make_from_saved(self.result.last_checkpoint, weights_only, owner)
        find_checkpoint_io(self.config.plugins).save_checkpoint(checkpoint, filepath, storage_options)


# Not written into the class, because editors read the plain docstring there.
setattr(Trainer, "__doc__", KeywordDoc(Trainer.__doc__, Trainer, Config, EvaluationArguments))  # noqa: B010


def find_available(arguments: Mapping[str, Value]) -> Available:
    """The GPUs of this machine, and the resources of the Ray cluster that is connected or named, if there is one."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    address = os.environ.get("RAY_ADDRESS")
    if "ray" in sys.modules or address:
        from raylight.launch.ray_actors import describe_cluster

        found = describe_cluster()
        if found is not None:
            gpus = num_gpus if found.started_here else found.num_gpus  # it is started again where it has fewer
            return Available(num_gpus, True, gpus, found.num_cpus, found.started_here, found.autoscales)
    return Available(num_gpus, address)


@passes_on_keywords_of(Trainer)
def fit(
    module: Module,
    train_dataloaders: Loader = None,
    val_dataloaders: Loader = None,
    *,
    datamodule: DataModule | None = None,
    resume: CheckpointPath = None,
    **trainer_arguments: Unpack[TrainerArguments],
) -> Result:
    """Trains `module` and returns a Result.

    `resume`: None starts a new version; "last" continues where the newest version of this run stopped, "best" and a
    checkpoint's path from there. The other arguments are the Trainer's. After it, `module` holds the trained weights,
    on the CPU, whatever the number of workers. Raises InvalidArguments before anything starts, WorkerFailed if a
    worker could not go on.
    """
    return Trainer(**trainer_arguments).fit(module, train_dataloaders, val_dataloaders, datamodule, resume)


@passes_on_keywords_of(Trainer)
def validate(
    module: Module, dataloaders: Loader = None, *, datamodule: DataModule | None = None,
    checkpoint: CheckpointPath = None, **trainer_arguments: Unpack[EvaluationArguments],
) -> list[dict[str, float]]:  # fmt: skip
    """Metrics of validation_step over `dataloaders`: a list with one dict for each loader. The weights are those of
    `module`, or of `checkpoint`: "best", "last" or a path. The other arguments are the Trainer's."""
    return Trainer(**trainer_arguments).validate(module, dataloaders, checkpoint, datamodule=datamodule)


@passes_on_keywords_of(Trainer)
def test(
    module: Module, dataloaders: Loader = None, *, datamodule: DataModule | None = None,
    checkpoint: CheckpointPath = None, **trainer_arguments: Unpack[EvaluationArguments],
) -> list[dict[str, float]]:  # fmt: skip
    """As `validate`, with test_step and the test loaders."""
    return Trainer(**trainer_arguments).test(module, dataloaders, checkpoint, datamodule=datamodule)


@passes_on_keywords_of(Trainer)
def predict(
    module: Module, dataloaders: Loader = None, *, datamodule: DataModule | None = None,
    checkpoint: CheckpointPath = None, return_predictions: bool = True,
    **trainer_arguments: Unpack[EvaluationArguments],
) -> list[Output]:  # fmt: skip
    """Outputs of predict_step in dataset order, each sample once, whatever the number of workers.

    With `return_predictions=False` none are kept, for a predict_step or callback that writes them itself. `checkpoint`
    and the other arguments are as for `validate`.
    """
    return Trainer(**trainer_arguments).predict(module, dataloaders, datamodule, return_predictions, checkpoint)
