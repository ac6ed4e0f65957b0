"""Worker: one process of a run. It holds its place, what it was given to do, and the parts that own its state."""

from __future__ import annotations

import torch
import torch.distributed as dist

from raylight.contract.kinds import Output
from raylight.contract.task import Place, Task
from raylight.user.data_module import DataModule
from raylight.user.module import Module
from raylight.user.profilers import PassThroughProfiler, Profiler
from raylight.worker.checkpoint.saving import Saving
from raylight.worker.data.batch_transfer import BatchTransfer
from raylight.worker.data.training_data import EvaluationData, TrainingData, find_loader
from raylight.worker.group.control import Control
from raylight.worker.hooks import Hooks, bind_step
from raylight.worker.metrics.metrics import Metrics
from raylight.worker.outbox import Outbox
from raylight.worker.progress import Progress
from raylight.worker.step.optimizers import Optimizers
from raylight.worker.step.precision import make_precision


class Worker:
    """Everything of one worker that outlives a generation of its group."""

    def __init__(self, task: Task, place: Place, control: Control):
        self.task, self.place, self.control, self.config = task, place, control, task.config
        self.outbox = Outbox()
        self.hooks = Hooks(task.trainer, task.module, task.loaders.data_module, task.callbacks)
        self.shipped = dict(vars(task.loaders.data_module)) if task.loaders.data_module is not None else {}
        """The attributes of the data module as they came from the caller."""
        self.device = torch.device(place.device)
        self.stage = "train" if task.stage == "fit" else task.stage
        self.precision = make_precision(self.config.precision, self.device.type, plugins=self.config.plugins)
        self.transfer = BatchTransfer(self.hooks, self.device, self.precision)
        self.metrics = Metrics(task.module, place.world_size, tell=self.warn_once)
        self.profiler: Profiler = self.config.profiler or PassThroughProfiler()
        self.progress = Progress()
        self.optimizers = Optimizers()
        self.saving = Saving()
        self.data = TrainingData(self.config, task.seed)
        self.evaluation_data: dict[str, EvaluationData] = {}
        self.epoch_outputs: list[Output] = []
        """Of the epoch's training steps, for `training_epoch_end`."""
        self.has_ended = False
        """All steps are made and saved."""
        self.should_stop = False
        self.status = "finished"
        self.is_validation_requested = False
        """The driver, which has the clock, has asked for one."""
        self.has_trained = False
        """Its state is that of the run, and not only of its start."""
        self.seconds: dict[str, float] = {}
        """What its time went to."""

    def warn_once(self, text: str) -> None:
        """For what all ranks find alike: the first of them says it."""
        if self.is_first:
            self.outbox.notice(text, "warning")

    # ---- where it stands

    @property
    def module(self) -> Module:
        return self.hooks.module

    @property
    def data_module(self) -> DataModule | None:
        return self.hooks.data_module

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def is_first(self) -> bool:
        return self.place.rank == 0

    @property
    def is_fitting(self) -> bool:
        return self.task.stage == "fit"

    def move(self, task: Task, place: Place, control: Control) -> None:
        """Take another place, in the group that goes on after a failure."""
        if (place.rank, place.world_size) != (self.rank, self.world_size):
            self.evaluation_data.clear()  # and so the loaders are dealt anew
            self.saving.move(place.rank, place.world_size)
        self.task, self.place, self.control = task, place, control
        self.metrics.resize(place.world_size)
        if place.world_size == 1:
            self.optimizers.rest_raw_backward()
        self.hooks.attach()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    # ---- what it does now

    def enter(self, stage: str) -> None:
        self.stage = stage

    def begin_timing(self) -> None:
        self.seconds |= {"data": 0.0, "validation": 0.0}

    def begin_training(self) -> None:
        self.has_trained = True

    def end_training(self) -> None:
        self.has_ended = True

    def request_validation(self, is_requested: bool = True) -> None:
        self.is_validation_requested = is_requested

    def drop_epoch_outputs(self) -> None:
        self.epoch_outputs = []  # a new list: the user's hook may have kept the other

    def request_stop(self, should_stop: bool = True) -> None:
        """Ends training after the present batch, once the minimum of epochs and steps is reached."""
        self.should_stop = should_stop

    def end_as(self, should_stop: bool, status: str) -> None:
        """`status` is "finished", "stopped" or "interrupted"."""
        self.should_stop, self.status = should_stop, status

    # ---- loaders

    def open_training_data(self) -> None:
        """Finds the training loader and divides it; again where loaders are reloaded every n epochs."""
        loader = find_loader(self.task.loaders, self.hooks, "train")
        index = self.data.open(loader, self.rank, self.world_size, self.progress.current_epoch)
        if index is not None:
            self.progress.enter_epoch_at(index)
            if self.data.batches is not None:
                self.progress.note_position(self.data.batches.position)

    def open_evaluation_data(self, stage: str) -> EvaluationData:
        """Finds the loaders of a stage and deals them."""
        config = self.config
        limit = {
            "validate": config.limit_val_batches,
            "test": config.limit_test_batches,
            "predict": config.limit_predict_batches,
        }[stage]
        if stage == "validate" and config.overfit_batches and self.is_fitting:
            limit = config.overfit_batches
        given = find_loader(self.task.loaders, self.hooks, stage)
        data = EvaluationData(given, self.place, limit, self.task.seed, self.progress.current_epoch)
        step = f"{'validation' if stage == 'validate' else stage}_step"
        if self.hooks.overrides(step):
            bind_step(getattr(self.module, step), several=len(data.batches) > 1)  # what it cannot take shows here
        self.evaluation_data[stage] = data
        return data
