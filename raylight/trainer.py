"""Trainer and fit, validate, test, predict: from arguments to a Result."""

# ruff: noqa: PT028  (`test` is no test of pytest's)

from __future__ import annotations

import os
from typing import Any

import torch

from raylight.arguments import checks
from raylight.arguments.resolving import as_list, resolve
from raylight.arguments.scale import Available
from raylight.contract.config import Config
from raylight.contract.errors import InvalidArguments
from raylight.contract.task import Loaders
from raylight.user.data_module import DataModule

NAMES = {"fit": "train_dataloaders", "validate": "dataloaders", "test": "dataloaders", "predict": "dataloaders"}


class Trainer:
    """Lightning's Trainer over raylight: holds the arguments, and after a run what it left.

    Every argument is keyword only and one of API.md's "Trainer arguments". Raises InvalidArguments with all mistakes
    at once, and NotEnoughResources where more was asked for than there is.
    """

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.callbacks: list[Any] = as_list(arguments.get("callbacks"))
        self.config: Config = resolve(arguments, find_available(arguments))
        self.result: Any = None
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.logged_metrics: dict[str, torch.Tensor] = {}
        self.current_epoch = 0
        self.global_step = 0
        self.log_dir: str | None = None
        self._model: Any = None
        self._run: Any = None

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

    # ---- Lightning's names

    @property
    def model(self) -> Any:
        return self._model

    lightning_module = model

    @property
    def checkpoint_callback(self) -> Any:
        """The ModelCheckpoint among the callbacks; one is made where none was passed. Has best_model_path and
        last_model_path after a fit."""
        from raylight.callbacks import ModelCheckpoint

        found = next((c for c in self.callbacks if isinstance(c, ModelCheckpoint)), None)
        if found is None and self.config.checkpoint is not None:
            found = self.__dict__.setdefault("_checkpoint_callback", ModelCheckpoint())
            self._fill_checkpoint_callback(found)
        return found

    @property
    def early_stopping_callback(self) -> Any:
        from raylight.callbacks import EarlyStopping

        return next((c for c in self.callbacks if isinstance(c, EarlyStopping)), None)

    @property
    def world_size(self) -> int:
        workers = self.config.num_workers
        return max(workers, 1) if isinstance(workers, int) else workers[1] if isinstance(workers, tuple) else 1

    @property
    def max_epochs(self) -> int | None:
        return self.config.max_epochs

    @property
    def max_steps(self) -> int:
        return self.config.max_steps

    @property
    def default_root_dir(self) -> str:
        return self.config.storage_path

    @property
    def is_global_zero(self) -> bool:
        return True

    @property
    def loggers(self) -> list[Any]:
        return self._run.loggers if self._run is not None else []

    @property
    def logger(self) -> Any:
        return next(iter(self.loggers), None)

    def save_checkpoint(self, path: Any, weights_only: bool = False) -> None:
        """Copies the last checkpoint of this trainer's fit to `path`, a directory that must not exist."""
        from raylight.loading import copy_checkpoint

        if self.result is None or self.result.last_checkpoint is None:
            raise InvalidArguments("save_checkpoint: there is no checkpoint yet; call fit first, with checkpoint=True")
        copy_checkpoint(self.result.last_checkpoint, os.fspath(path), weights_only)

    # ---- one run

    def _execute(self, stage: str, model: Any, loaders: Loaders, ckpt_path: Any, verbose: bool = True) -> Any:
        from raylight.execution import Execution

        given_model = model
        model = model if model is not None else self._model
        mistakes = [] if model is not None else [f"{stage} needs a model: pass one, or call fit first"]
        if model is not None:
            mistakes += checks.check_run(stage, model, loaders, self.config, self.callbacks)
        if mistakes:
            raise InvalidArguments(mistakes)
        if ckpt_path is None and given_model is None and self.result is not None and self.result.best_checkpoint:
            ckpt_path = "best"
        self._model = model
        execution = Execution(self.config, self.callbacks, stage, model, loaders, self.result)
        try:
            return execution.run(ckpt_path, verbose)
        finally:
            self._take(execution)

    def _take(self, execution: Any) -> None:
        """What a run leaves behind for the caller to read."""
        run = execution.driver
        if run is None:
            return
        self._run = run
        self.callback_metrics = {name: torch.tensor(value) for name, value in run.callback_metrics.items()}
        self.logged_metrics = {name: torch.tensor(value) for name, value in run.logged_metrics.items()}
        if run.version is not None:
            self.log_dir = run.version.path
        if execution.stage == "fit":
            self.result = execution.result or self.result
            self.global_step, self.current_epoch = run.step, run.epoch
            for callback in self.callbacks:
                self._fill_checkpoint_callback(callback)

    def _fill_checkpoint_callback(self, callback: Any) -> None:
        if self._run is not None and hasattr(callback, "take_kept"):
            callback.take_kept(self._run.checkpoints, self._run.best, self._run.last)


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
