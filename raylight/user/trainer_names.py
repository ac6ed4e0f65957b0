"""The trainer that hooks receive: Lightning's names, each read from the owner of the fact.

A `Fact` is read from the run, a `Setting` from the arguments, and `INSTEAD` lists the names of Lightning's trainer that
are missing here, with what to use.
"""

from __future__ import annotations

import difflib
import os
import pickle
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import cloudpickle
import torch

from raylight.contract.kinds import Value
from raylight.user.accelerators import Accelerator, accelerator_of
from raylight.user.checkpoint_io import find_checkpoint_io
from raylight.user.forwarding import Fact, Setting
from raylight.user.loop_facades import EvaluationLoopFacade, FitLoopFacade
from raylight.user.overriding import overrides
from raylight.user.precision_plugins import Precision, plugin_of
from raylight.user.profilers import PassThroughProfiler, Profiler
from raylight.user.run_view import Record, RunView
from raylight.user.states import RunningStage, TrainerFn, TrainerState
from raylight.user.strategies import LightningStrategy, strategy_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from raylight.contract.config import Config, FilePath
    from raylight.contract.messages import FileOrder
    from raylight.contract.task import Files
    from raylight.user.run_view import Loader, SchedulerEntry

INSTEAD = {
    "init_module": "build large modules in configure_model(self); it runs on every worker",
    "enable_autolog_hparams": "save_hyperparameters(logger=False) keeps them from the loggers",
    "received_sigterm": "trainer.interrupted says that a signal ends the run",
    "val_check_batch": "trainer.val_check_interval is the argument; trainer.num_training_batches the epoch's length",
    "data_connector": "trainer.train_dataloader and trainer.val_dataloaders are the loaders",
}
"""Public names of Lightning's Trainer that are not here, and what to use."""


class TrainerNames:
    """The `trainer` of hooks and callbacks; `raylight.Trainer` adds fit, validate, test and predict."""

    config: Config
    """All arguments, as resolved."""
    _view: RunView
    _fn: TrainerFn | None

    def __init__(self, config: Config, callbacks: list[Value] | None = None):
        self.config = config
        self._view = Record(callbacks=callbacks or [], accumulate_grad_batches=config.accumulate_grad_batches)
        self._fn = None

    def follow(self, view: RunView, fn: str) -> None:
        """Reads from this run from here on; `fn` is "fit", "validate", "test" or "predict"."""
        self._view, self._fn = view, TrainerFn(fn)

    def __getstate__(self) -> dict[str, Value]:
        """The part that is sent to workers: the arguments, and attributes of a subclass as far as they can be sent."""
        config = replace(self.config, logger=bool(self.config.logger), storage_filesystem=None)
        own = {name: value for name, value in vars(self).items() if name not in self._stays and _can_be_sent(value)}
        return {**own, "config": config, "_view": Record(), "_fn": None}

    _stays: frozenset[str] = frozenset({"config", "_view", "_fn"})
    """Attributes that are not sent."""

    # ---- the run's

    world_size: Fact[int] = Fact()
    global_rank: Fact[int] = Fact()
    local_rank: Fact[int] = Fact()
    node_rank: Fact[int] = Fact()
    num_nodes: Fact[int] = Fact()
    device: Fact[torch.device] = Fact()
    attempt: Fact[int] = Fact()
    seed: Fact[int | None] = Fact()
    lightning_module: Fact[Value] = Fact("module")
    model: Fact[Value] = Fact("module")
    datamodule: Fact[Value] = Fact()
    callbacks: Fact[list[Value]] = Fact()
    loggers: Fact[list[Value]] = Fact()
    log_dir: Fact[str | None] = Fact()
    files: Fact[Files | None] = Fact()
    ckpt_path: Fact[str | None] = Fact()
    current_epoch: Fact[int] = Fact()
    global_step: Fact[int] = Fact()
    num_batches_seen: Fact[int] = Fact()
    is_last_batch: Fact[bool] = Fact()
    interrupted: Fact[bool] = Fact()
    should_stop: Fact[bool] = Fact(change=lambda view, value: view.request_stop(bool(value)))
    optimizers: Fact[list[Optimizer]] = Fact(change=lambda view, value: view.replace_optimizers(list(value)))
    lr_scheduler_configs: Fact[list[SchedulerEntry]] = Fact()
    stepping_optimizers: Fact[list[Value]] = Fact()
    accumulate_grad_batches: Fact[int] = Fact(change=lambda view, value: view.set_accumulate_grad_batches(value))
    scaler: Fact[Value] = Fact()
    train_dataloader: Fact[Loader] = Fact()
    val_dataloaders: Fact[Loader] = Fact()
    test_dataloaders: Fact[Loader] = Fact()
    predict_dataloaders: Fact[Loader] = Fact()
    num_training_batches: Fact[int | float] = Fact()
    num_val_batches: Fact[list[int | float]] = Fact()
    num_test_batches: Fact[list[int | float]] = Fact()
    num_predict_batches: Fact[list[int | float]] = Fact()
    estimated_stepping_batches: Fact[int | float] = Fact()
    callback_metrics: Fact[dict[str, Tensor]] = Fact()
    logged_metrics: Fact[dict[str, Tensor]] = Fact()
    progress_bar_metrics: Fact[dict[str, float]] = Fact()

    # ---- the arguments'

    max_epochs: Setting[int | None] = Setting()
    min_epochs: Setting[int | None] = Setting()
    max_steps: Setting[int] = Setting()
    min_steps: Setting[int | None] = Setting()
    limit_train_batches: Setting[int | float] = Setting()
    limit_val_batches: Setting[int | float] = Setting()
    limit_test_batches: Setting[int | float] = Setting()
    limit_predict_batches: Setting[int | float] = Setting()
    overfit_batches: Setting[int | float] = Setting()
    fast_dev_run: Setting[int] = Setting()
    val_check_interval: Setting[int | float | timedelta] = Setting()
    check_val_every_n_epoch: Setting[int | None] = Setting()
    num_sanity_val_steps: Setting[int] = Setting()
    reload_dataloaders_every_n_epochs: Setting[int] = Setting()
    precision: Setting[str] = Setting()
    gradient_clip_val: Setting[float | None] = Setting()
    gradient_clip_algorithm: Setting[str] = Setting()
    log_every_n_steps: Setting[int] = Setting()
    default_root_dir: Setting[str] = Setting("storage_path")
    barebones: Setting[bool] = Setting()

    # ---- what follows from these

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self._view.global_rank == 0

    @property
    def state(self) -> TrainerState:
        """Function, stage and status, as they are now."""
        return TrainerState(self._view.status, self._fn, self._view.stage)

    def _is_in(self, *stages: RunningStage) -> bool:
        return self._view.stage in stages

    @property
    def training(self) -> bool:
        """Whether a batch of training is on, or a hook around it."""
        return self._is_in(RunningStage.TRAINING)

    @property
    def validating(self) -> bool:
        """Whether a validation is on; the sanity check is none."""
        return self._is_in(RunningStage.VALIDATING)

    @property
    def testing(self) -> bool:
        """Whether a test is on."""
        return self._is_in(RunningStage.TESTING)

    @property
    def predicting(self) -> bool:
        """Whether a prediction is on."""
        return self._is_in(RunningStage.PREDICTING)

    @property
    def sanity_checking(self) -> bool:
        """Whether the validation batches before training are on."""
        return self._is_in(RunningStage.SANITY_CHECKING)

    @property
    def evaluating(self) -> bool:
        """Whether validation, test or sanity check is on."""
        return self._view.stage is not None and self._view.stage.evaluating

    @property
    def fitting(self) -> bool:
        """Whether `fit` is what was called last; it validates too."""
        return self._fn is TrainerFn.FITTING

    @property
    def enable_validation(self) -> bool:
        """Whether a fit validates: there is a validation_step, and `limit_val_batches` leaves something."""
        return bool(self.config.limit_val_batches) and overrides(self._view.module, "validation_step")

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Batches of each validation loader that the sanity check takes, over all workers."""
        limit = self.config.num_sanity_val_steps
        return [count if limit == -1 else min(count, limit) for count in self.num_val_batches]

    @property
    def profiler(self) -> Profiler:
        """Measures sections of your own: `with trainer.profiler.profile("name"): ...`. On a worker, that worker's."""
        found: Profiler = self.config.profiler or PassThroughProfiler()
        return found

    @property
    def logger(self) -> Value:
        """The first of the loggers; None if there is none."""
        return next(iter(self.loggers), None)

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device that this worker has."""
        return accelerator_of(self._view.device)

    @property
    def num_devices(self) -> int:
        """Devices on each node."""
        return max(self._view.world_size // max(self._view.num_nodes, 1), 1)

    @property
    def device_ids(self) -> list[int]:
        """Indices of the devices of a node."""
        return list(range(self.num_devices))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """The arguments for a DistributedSampler of your own."""
        return {"num_replicas": self._view.world_size, "rank": self._view.global_rank}

    @property
    def strategy(self) -> LightningStrategy:
        """How the ranks act together."""
        return strategy_of(self._view, find_checkpoint_io(self.config.plugins))

    @property
    def precision_plugin(self) -> Precision:
        """For code that asks Lightning's plugin: its class, `.precision` and `.scaler`."""
        return plugin_of(self.config.precision, self._view.scaler)

    @property
    def fit_loop(self) -> FitLoopFacade:
        """Where the epochs and batches of a fit stand."""
        return FitLoopFacade(self._view, self.config)

    @property
    def validate_loop(self) -> EvaluationLoopFacade:
        """The loaders of validation."""
        return EvaluationLoopFacade(self._view, RunningStage.VALIDATING)

    @property
    def test_loop(self) -> EvaluationLoopFacade:
        """The loaders of a test."""
        return EvaluationLoopFacade(self._view, RunningStage.TESTING)

    @property
    def predict_loop(self) -> EvaluationLoopFacade:
        """The loaders of a prediction."""
        return EvaluationLoopFacade(self._view, RunningStage.PREDICTING)

    @property
    def early_stopping_callbacks(self) -> list[Value]:
        """All EarlyStopping among the callbacks."""
        return self._find_callbacks("EarlyStopping")

    @property
    def early_stopping_callback(self) -> Value:
        """The first EarlyStopping among the callbacks, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def checkpoint_callbacks(self) -> list[Value]:
        """All ModelCheckpoint among the callbacks."""
        return self._find_callbacks("Checkpoint")

    @property
    def checkpoint_callback(self) -> Value:
        """The first ModelCheckpoint among the callbacks, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def progress_bar_callback(self) -> Value:
        """The progress bar among the callbacks, or None."""
        return next(iter(self._find_callbacks("ProgressBar")), None)

    def _find_callbacks(self, kind: str) -> list[Value]:
        return [c for c in self.callbacks if any(k.__name__.endswith(kind) for k in type(c).__mro__)]

    # ---- what hooks may do

    def notice(self, text: str, level: str = "info") -> None:
        """Shows the person a sentence, once, on the driver's console; `level` is "info" or "warning"."""
        self._view.add_notice(text, level)

    def print(self, *args: object, **kwargs: Value) -> None:
        """Prints on rank 0 alone."""
        if self.is_global_zero:
            print(*args, **kwargs)

    def request_checkpoint(self) -> None:
        """Saves at the end of this step. Call it on every rank at the same step."""
        self._view.request_checkpoint()

    def save_checkpoint(self, filepath: FilePath, weights_only: bool = False, storage_options: object = None) -> None:
        """Writes the present state to one file, at a path or a URI, whole or not at all. `torch.load` opens it, and
        Lightning goes on from it.

        Call it on every rank at the same step; rank 0 writes. With `weights_only` optimizers, schedulers and callbacks
        are left out. `storage_options` is for a CheckpointIO among the plugins.
        """
        self._view.save_checkpoint(filepath, weights_only, storage_options)

    def order_file(self, order: FileOrder) -> None:
        """Asks for a file with the present state, a link or a deletion; done in this order, behind the loop.

        Call it on every rank at the same step.
        """
        self._view.order_file(order)

    def is_file_wanted(self, path: FilePath) -> bool | None:
        """Whether a file that was asked for will be at this path; None if nobody asked for one there."""
        return self._view.is_file_wanted(os.fspath(path))

    def find_samples(self, dataloader_idx: int, batch_idx: int) -> list[Value] | None:
        """The samples of a batch of the evaluation that is on, as indices into the loader's dataset; None if the
        data has no indices."""
        return self._view.find_samples(dataloader_idx, batch_idx)

    def finish_copying(self) -> None:
        """Returns once no checkpoint copies weights and optimizer state any more, so that they may be changed."""
        self._view.finish_copying()

    def forward_training_epoch(self, skip_uneven: bool = False) -> None:
        """Calls training_step on each of this rank's batches, as to measure statistics; what it logs is dropped.

        With `skip_uneven` a batch that some rank lacks is left out.
        """
        self._view.forward_training_epoch(skip_uneven)

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self._view.barrier()

    def broadcast(self, value: Value, src: int = 0) -> Value:
        """The value of rank `src`, on every rank."""
        return self._view.broadcast(value, src)

    def all_gather(self, data: Value, group: object = None, sync_grads: bool = False) -> Value:
        """Tensors of all ranks, stacked along a new first dimension; one rank adds none."""
        return self._view.all_gather(data, group, sync_grads)

    def reduce(self, tensor: Value, group: object = None, reduce_op: str = "mean") -> Tensor:
        """The mean over all ranks, or with "sum" the sum."""
        return self._view.reduce(tensor, group, reduce_op)

    # ---- what is not there

    if not TYPE_CHECKING:  # a type checker reports unknown names itself

        def __getattr__(self, name: str) -> Value:
            if name.startswith("_") or name == "config":
                raise AttributeError(name)
            if hasattr(type(self), name):  # a property that failed: call it again, for its own error
                return object.__getattribute__(self, name)
            known = [attribute for attribute in {*dir(type(self)), *self.__dict__} if not attribute.startswith("_")]
            near = difflib.get_close_matches(name, known, 1)
            hint = INSTEAD.get(name) or (f"did you mean {near[0]!r}?" if near else "")
            raise AttributeError(f"the trainer has no attribute {name!r}" + (f"; {hint}" if hint else ""))


def _can_be_sent(value: object) -> bool:
    try:
        cloudpickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError, RuntimeError):
        return False
    return True
