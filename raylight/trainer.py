"""Trainer and fit, validate, test, predict: from arguments to a Result."""

# ruff: noqa: PT028  (`test` is no test of pytest's)

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from raylight.arguments import checks
from raylight.arguments.resolving import as_list, resolve
from raylight.arguments.scale import Available
from raylight.contract.errors import InvalidArguments
from raylight.contract.task import Loaders
from raylight.user.data_module import DataModule
from raylight.user.run_view import Record, WorkersRecord, facts_of
from raylight.user.states import TrainerStatus
from raylight.user.trainer_names import TrainerNames

if TYPE_CHECKING:
    from raylight.driver.result import Result
    from raylight.execution import Claimed, Execution, Kept

NAMES = {"fit": "train_dataloaders", "validate": "dataloaders", "test": "dataloaders", "predict": "dataloaders"}


class Trainer(TrainerNames):
    """Lightning's Trainer over raylight, and what hooks receive as `trainer`: in this process this very object, on a
    worker one of the same class.

    Every argument is keyword only and one of API.md's "Trainer arguments". Raises InvalidArguments with all mistakes
    at once, and NotEnoughResources where more was asked for than there is.
    """

    _stays = TrainerNames._stays | {"arguments", "result", "_claimed", "_kept"}

    def __init__(self, **arguments: Any) -> None:
        super().__init__(resolve(arguments, find_available(arguments)), as_list(arguments.get("callbacks")))
        self.arguments = arguments
        self.result: Result | None = None
        self._claimed: Claimed | None = None
        self._kept: Kept | None = None

    # ---- what to do

    def fit(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Trains `model` and returns a Result; afterwards `model` holds the trained weights, on the CPU.

        `ckpt_path`: None starts a new version; "last" continues the newest version of this run where it stopped, or
        starts one where there is none; "best" or a checkpoint's path continue from there in a new version.
        """
        if isinstance(train_dataloaders, DataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        loaders = Loaders(train=train_dataloaders, validate=val_dataloaders, data_module=datamodule)
        return self._execute("fit", model, loaders, ckpt_path)

    def validate(
        self,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: Any = None,
        verbose: bool = True,
    ) -> list[dict[str, float]]:
        """One dict of metrics for each loader, exact for any number of workers."""
        loaders = self._evaluation_loaders("validate", dataloaders, datamodule)
        return self._execute("validate", model, loaders, ckpt_path, verbose)

    def test(
        self,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: Any = None,
        verbose: bool = True,
    ) -> list[dict[str, float]]:
        """As `validate`, with test_step and the test loaders."""
        loaders = self._evaluation_loaders("test", dataloaders, datamodule)
        return self._execute("test", model, loaders, ckpt_path, verbose)

    def predict(
        self, model: Any = None, dataloaders: Any = None, datamodule: Any = None, return_predictions: bool = True,
        ckpt_path: Any = None,
    ) -> list[Any]:  # fmt: skip
        """What predict_step returned for each batch, on the CPU, in dataset order; a list of such lists where there
        are several loaders."""
        loaders = self._evaluation_loaders("predict", dataloaders, datamodule)
        found = self._execute("predict", model, loaders, ckpt_path)
        return found if return_predictions else []

    def _evaluation_loaders(self, stage: str, dataloaders: Any, datamodule: Any) -> Loaders:
        if isinstance(dataloaders, DataModule):
            dataloaders, datamodule = None, dataloaders
        loaders = Loaders(data_module=datamodule)
        setattr(loaders, stage, dataloaders)
        return loaders

    # ---- before the first run

    @property
    def loggers(self) -> list[Any]:  # type: ignore[override]
        """The loggers; asked before a fit, they and the version's directory are made at once."""
        self._claim()
        return self._view.loggers

    @property
    def log_dir(self) -> str | None:  # type: ignore[override]
        """The version directory, as path or URI; asked before a fit, it is claimed at once. None where nothing is
        written."""
        self._claim()
        return self._view.log_dir

    def _claim(self) -> None:
        if self._fn is None and self._claimed is None and not self.config.fast_dev_run:
            from raylight.execution import claim

            claimed = self._claimed = claim(self.config)
            self._view = Record(
                callbacks=self.callbacks, loggers=claimed.loggers, log_dir=claimed.version.path,
                accumulate_grad_batches=self.config.accumulate_grad_batches,
            )  # fmt: skip

    @property
    def checkpoint_callback(self) -> Any:
        """The ModelCheckpoint among the callbacks; one is made if none was passed. Has best_model_path and
        last_model_path after a fit."""
        from raylight.callbacks import ModelCheckpoint

        found = super().checkpoint_callback
        if found is None and self.config.checkpoint is not None:
            found = ModelCheckpoint()
            self._fill(found)
        return found

    def save_checkpoint(self, filepath: Any, weights_only: bool = False, storage_options: Any = None) -> None:
        """In a hook as `TrainerNames.save_checkpoint`; after a fit copies its last checkpoint to `filepath`, a
        directory that must not exist."""
        from raylight.loading import copy_checkpoint

        if self.state.status is TrainerStatus.RUNNING:
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        if self.result is None or self.result.last_checkpoint is None:
            raise InvalidArguments("save_checkpoint: there is no checkpoint yet; call fit first, with checkpoint=True")
        copy_checkpoint(self.result.last_checkpoint, os.fspath(filepath), weights_only)

    # ---- one run

    def _execute(self, stage: str, model: Any, loaders: Loaders, ckpt_path: Any, verbose: bool = True) -> Any:
        from raylight.execution import Execution

        given_model = model
        model = model if model is not None else self.lightning_module
        mistakes = [] if model is not None else [f"{stage} needs a model: pass one, or call fit first"]
        if model is not None:
            mistakes += checks.check_run(stage, model, loaders, self.config, self.callbacks)
        if mistakes:
            raise InvalidArguments(mistakes)
        if ckpt_path is None and given_model is None and self.result is not None and self.result.best_checkpoint:
            ckpt_path = "best"
        execution = Execution(self, stage, model, loaders, self.result, self._claimed)
        self._claimed = None
        try:
            return execution.run(ckpt_path, verbose)
        finally:
            self._remember(execution)

    def _remember(self, execution: Execution) -> None:
        """Keeps what a run leaves behind for the caller to read."""
        driver, before, given = execution.driver, self._view, execution.loaders
        if driver is None:
            return
        if execution.stage == "fit":
            self.result, self._kept = execution.result or self.result, execution.kept
        step, epoch = (driver.step, driver.epoch) if execution.stage == "fit" else execution.trained
        facts = facts_of(before) if execution.group.is_local else execution.facts | {
            "train_dataloader": given.train, "val_dataloaders": given.validate, "test_dataloaders": given.test,
            "predict_dataloaders": given.predict,
        }  # fmt: skip
        facts |= {
            "module": execution.module,
            "datamodule": given.data_module,
            "callbacks": execution.callbacks,
            "loggers": driver.loggers,
            "stage": None,
            "status": TrainerStatus.INTERRUPTED if execution.was_interrupted else TrainerStatus.FINISHED,
            "log_dir": driver.version.path if driver.version is not None else before.log_dir,
            "callback_metrics": {name: torch.tensor(value) for name, value in driver.callback_metrics.items()},
            "logged_metrics": {name: torch.tensor(value) for name, value in driver.logged_metrics.items()},
            "global_step": step,
            "current_epoch": epoch,
        }
        record = Record(**facts) if execution.group.is_local else WorkersRecord(**facts)
        self.follow(record, execution.stage)
        for callback in self.callbacks:
            self._fill(callback)

    def _fill(self, callback: Any) -> None:
        """A checkpoint callback is told what was kept."""
        if self._kept is not None and hasattr(callback, "take_kept"):
            callback.take_kept(self._kept.checkpoints, self._kept.best, self._kept.last)


def find_available(arguments: dict[str, Any]) -> Available:
    """What this machine has; a Ray that the user connected or named is asked only where workers go there."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    address = os.environ.get("RAY_ADDRESS")
    import sys

    if "ray" in sys.modules or address:
        from raylight.launch.ray_actors import describe_cluster

        found = describe_cluster()
        if found is not None:
            return Available(num_gpus, True, found.num_gpus, found.num_cpus, found.autoscales)
    return Available(num_gpus, address)


def fit(
    module: Any,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: Any = None,
    resume: Any = None,
    **trainer_arguments: Any,
) -> Any:
    """Trains `module` and returns a Result.

    `resume`: None starts a new version; "last" continues where the newest version of this run stopped, "best" and a
    checkpoint's path from there. The other arguments are the Trainer's. After it, `module` holds the trained weights,
    on the CPU, whatever the number of workers. Raises InvalidArguments before anything starts, WorkerFailed where a
    worker could not go on.
    """
    return Trainer(**trainer_arguments).fit(module, train_dataloaders, val_dataloaders, datamodule, resume)


def validate(
    module: Any, dataloaders: Any = None, *, datamodule: Any = None, checkpoint: Any = None, **trainer_arguments: Any
) -> Any:
    """Metrics of validation_step over `dataloaders`: a list with one dict for each loader."""
    return Trainer(**trainer_arguments).validate(module, dataloaders, datamodule, checkpoint)


def test(
    module: Any, dataloaders: Any = None, *, datamodule: Any = None, checkpoint: Any = None, **trainer_arguments: Any
) -> Any:
    """Metrics of test_step over `dataloaders`: a list with one dict for each loader."""
    return Trainer(**trainer_arguments).test(module, dataloaders, datamodule, checkpoint)


def predict(
    module: Any, dataloaders: Any = None, *, datamodule: Any = None, checkpoint: Any = None, **trainer_arguments: Any
) -> Any:
    """Outputs of predict_step in dataset order, each sample once, whatever the number of workers."""
    return Trainer(**trainer_arguments).predict(module, dataloaders, datamodule, ckpt_path=checkpoint)
