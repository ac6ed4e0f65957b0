"""Tuner: finds settings before a run."""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias

from raylight.callbacks.batch_size_finder import BatchSizeFinder
from raylight.callbacks.learning_rate_finder import LearningRateFinder
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Loader
from raylight.contract.task import Loaders
from raylight.tuner import batch_sizes, learning_rates
from raylight.tuner.learning_rates import LRFinder
from raylight.tuner.rehearsal import as_rehearsing
from raylight.user.data_module import DataModule
from raylight.user.module import Module
from raylight.user.trainer_names import TrainerNames

METHODS = ("fit", "validate", "test", "predict")
Method: TypeAlias = Literal["fit", "validate", "test", "predict"]


class Tuner:
    """Finds a learning rate or a batch size with the trainer's arguments, and sets it on the module.

    Nothing else is changed: the module's weights, the data module, the trainer's callbacks, random numbers and storage
    are as before. Raises InvalidArguments before anything is tried.
    """

    def __init__(self, trainer: TrainerNames) -> None:
        self._trainer = trainer

    def scale_batch_size(
        self,
        model: Module,
        train_dataloaders: Loader | DataModule = None,
        val_dataloaders: Loader = None,
        dataloaders: Loader = None,
        datamodule: DataModule | None = None,
        method: Method = "fit",
        mode: batch_sizes.Mode = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> int | None:
        """The largest batch size with which no worker is out of memory, which is set on module and data module; None
        with `fast_dev_run`. The loaders must come from one of these two. The arguments are BatchSizeFinder's."""
        loaders = _collect(train_dataloaders, val_dataloaders, dataloaders, datamodule, method)
        self._check_unused(BatchSizeFinder)
        finder = BatchSizeFinder(mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)
        if self._is_skipped("scale_batch_size"):
            return None
        finder.search(as_rehearsing(self._trainer), method, model, loaders)
        return finder.optimal_batch_size

    def lr_find(
        self,
        model: Module,
        train_dataloaders: Loader | DataModule = None,
        val_dataloaders: Loader = None,
        dataloaders: Loader = None,
        datamodule: DataModule | None = None,
        method: Method = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: learning_rates.Mode = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> LRFinder | None:
        """Trains at rising learning rates, and returns what each led to, with `suggestion()`, `results` and `plot()`;
        None with `fast_dev_run`. The suggestion is set on the module. The arguments are LearningRateFinder's."""
        if method != "fit":
            raise InvalidArguments(f"lr_find trains, so method={method!r} must be 'fit'")
        loaders = _collect(train_dataloaders, val_dataloaders, dataloaders, datamodule, method)
        self._check_unused(LearningRateFinder)
        finder = LearningRateFinder(min_lr, max_lr, num_training, mode, early_stop_threshold, update_attr, attr_name)
        if self._is_skipped("lr_find"):
            return None
        finder.search(as_rehearsing(self._trainer), model, loaders)
        return finder.optimal_lr

    def _is_skipped(self, name: str) -> bool:
        if self._trainer.config.fast_dev_run:
            warnings.warn(f"{name} does nothing with fast_dev_run", stacklevel=3)
        return bool(self._trainer.config.fast_dev_run)

    def _check_unused(self, kind: type) -> None:
        if any(isinstance(callback, kind) for callback in self._trainer.callbacks):
            raise InvalidArguments(
                f"the trainer has a {kind.__name__} among its callbacks, which would do the same: leave it out, or do "
                "without Tuner"
            )


def _collect(
    train: Loader | DataModule, validate: Loader, evaluate: Loader, data_module: DataModule | None, method: str
) -> Loaders:
    if method not in METHODS:
        raise InvalidArguments(f"method={method!r}; allowed are {METHODS}")
    if method == "fit" and evaluate is not None:
        raise InvalidArguments("method='fit' takes train_dataloaders and val_dataloaders, not dataloaders")
    if method != "fit" and (train is not None or validate is not None):
        raise InvalidArguments(f"method={method!r} takes dataloaders, not train_dataloaders or val_dataloaders")
    if isinstance(train, DataModule):
        train, data_module = None, train
    if isinstance(evaluate, DataModule):
        evaluate, data_module = None, evaluate
    loaders = Loaders(train=train, validate=validate, data_module=data_module)
    if method != "fit":
        setattr(loaders, method, evaluate)
    return loaders
