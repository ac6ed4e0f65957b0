"""Session: one rank's part in a run over all generations of its group, and the run as its trainer sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from raylight.contract.config import FilePath
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Index, Loader, ProcessGroup, StateDict, Value
from raylight.contract.messages import FileOrder, FileWanted, Hyperparameters
from raylight.contract.seeding import RNGState
from raylight.contract.task import Files, Place, Task
from raylight.user.callback import Callback
from raylight.user.checkpoint_io import find_checkpoint_io
from raylight.user.data_module import DataModule
from raylight.user.module import Module
from raylight.user.run_view import NO_RUN
from raylight.user.states import RunningStage, TrainerStatus
from raylight.worker.checkpoint.lightning_file import save_run
from raylight.worker.group.collectives import all_gather, broadcast_object, reduce_tensor
from raylight.worker.group.control import Control
from raylight.worker.loop import Loop
from raylight.worker.metrics.callback_metrics import CallbackMetrics
from raylight.worker.metrics.logger_proxy import LoggerProxy
from raylight.worker.step.optimizers import SchedulerConfig, SteppingOptimizer
from raylight.worker.step.step import Step
from raylight.worker.worker import Worker

STAGES = {
    "sanity": RunningStage.SANITY_CHECKING,
    "train": RunningStage.TRAINING,
    "validate": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
    "predict": RunningStage.PREDICTING,
}


class Session:
    """A worker, its loop while it trains, and what is read of both under the names of `RunView`."""

    def __init__(self, task: Task, place: Place, control: Control):
        self.worker = Worker(task, place, control)
        self.loop: Loop | None = None
        self.restored_rng: RNGState | None = None
        """To be put in place just before the first step."""
        self.is_meeting = False
        """The ranks of a new generation make their states equal."""
        self.is_torn = False
        """What follows its newest step was cut short, as the step of a scheduler."""
        self.lost = ""
        """Why its state is not that of a whole step; empty if it is."""
        self.num_undone = 0
        """Batches of the step that was taken back."""
        self._is_on, self._said_dropped = True, False
        self._loggers = [LoggerProxy(self.worker, index, view) for index, view in enumerate(task.loggers)]
        self.log = self._drop_logged if task.config.barebones else self.worker.metrics.log
        self.begin()

    def _drop_logged(self, *_: Value) -> None:
        if not self._said_dropped:
            self._said_dropped = True
            self.worker.warn_once("barebones=True: what is logged is dropped")

    # ---- its life

    def begin(self) -> None:
        """The trainer reads from this session from here on."""
        self._is_on = True
        self.worker.hooks.trainer.follow(self, self.worker.task.stage)
        self.worker.hooks.attach()

    def open_loop(self) -> Loop:
        self.loop = Loop(self.worker)
        return self.loop

    def drop_loop(self) -> None:
        """With it goes DDP, which holds on to the group."""
        if self.loop is not None:
            self.loop.step.reduction.leave_ddp()
        self.loop = None

    def settle(self) -> None:
        """Takes back what a broken step or evaluation left, so that this rank stands at its last whole step."""
        worker = self.worker
        if self.loop is not None:
            self.num_undone = self.loop.step.num_broken
            self.is_torn = self.loop.step.undo()
            self.drop_loop()
        for parameter in worker.module.parameters():
            parameter.grad = None
        worker.metrics.rollback()
        worker.module._restore_modes()
        worker.saving.finish_copying()  # what is being copied may be overwritten when the ranks meet
        worker.saving.drop_request()
        worker.request_validation(False)
        worker.enter("train")

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """While the ranks of a new generation make their states equal."""
        self.is_meeting = True
        yield
        self.is_meeting, self.is_torn, self.num_undone = False, False, 0

    def lose(self, reason: str) -> None:
        """Its state is not that of a whole step; with no reason it is again."""
        self.lost = reason

    def keep_random_numbers(self, state: RNGState | None) -> None:
        self.restored_rng = state

    def take_random_numbers(self) -> RNGState | None:
        taken, self.restored_rng = self.restored_rng, None
        return taken

    def end(self) -> None:
        """The run is over; what it has left can still be read."""
        self._is_on = False
        self.worker.hooks.detach()

    @property
    def step(self) -> Step | None:
        return self.loop.step if self.loop is not None else None

    @property
    def batch_size(self) -> int:
        """Samples of the batch in hand; 0 if there is none."""
        return self.step.batch.size if self.step is not None and self.step.batch is not None else 0

    # ---- where it runs

    @property
    def stage(self) -> RunningStage | None:
        return STAGES[self.worker.stage] if self._is_on else None

    @property
    def status(self) -> TrainerStatus:
        if self._is_on:
            return TrainerStatus.RUNNING
        return TrainerStatus.INTERRUPTED if self.interrupted else TrainerStatus.FINISHED

    @property
    def world_size(self) -> int:
        return self.worker.world_size

    @property
    def global_rank(self) -> int:
        return self.worker.rank

    @property
    def local_rank(self) -> int:
        return self.worker.place.local_rank

    @property
    def node_rank(self) -> int:
        return self.worker.place.node_rank

    @property
    def num_nodes(self) -> int:
        return self.worker.place.num_nodes

    @property
    def device(self) -> torch.device:
        return self.worker.device

    @property
    def attempt(self) -> int:
        return self.worker.task.attempt

    @property
    def seed(self) -> int:
        return self.worker.task.seed

    # ---- what it runs

    @property
    def module(self) -> Module:
        return self.worker.module

    @property
    def datamodule(self) -> DataModule | None:
        return self.worker.data_module

    @property
    def callbacks(self) -> list[Callback]:
        return self.worker.hooks.callbacks

    @property
    def loggers(self) -> list[LoggerProxy]:
        return self._loggers

    @property
    def log_dir(self) -> str:
        return self.worker.task.version_path

    @property
    def files(self) -> Files | None:
        return self.worker.task.files

    @property
    def ckpt_path(self) -> str | None:
        checkpoint = self.worker.task.checkpoint
        file = self.worker.task.file
        return checkpoint.path if checkpoint is not None else file if isinstance(file, str) else None

    @property
    def optimizers(self) -> list[Optimizer]:
        return self.worker.optimizers.all

    @property
    def lr_scheduler_configs(self) -> list[SchedulerConfig]:
        return self.worker.optimizers.schedulers

    @property
    def stepping_optimizers(self) -> list[SteppingOptimizer]:
        return list(self.step.stepping_optimizers) if self.step is not None else []

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return self.worker.precision.scaler

    # ---- where it stands

    @property
    def current_epoch(self) -> int:
        return self.worker.progress.current_epoch

    @property
    def global_step(self) -> int:
        return self.worker.progress.global_step

    @property
    def batch_idx(self) -> int:
        return self.worker.progress.batch_idx

    @property
    def num_batches_seen(self) -> int:
        return self.worker.progress.num_batches_seen

    @property
    def has_batch(self) -> bool:
        return self.step is not None and self.step.batch is not None

    @property
    def is_last_batch(self) -> bool:
        return self.step is not None and self.step.batch is not None and self.step.batch.last

    @property
    def should_stop(self) -> bool:
        return self.worker.should_stop

    @property
    def interrupted(self) -> bool:
        return self.worker.status == "interrupted"

    @property
    def is_resuming(self) -> bool:
        task = self.worker.task
        return (task.checkpoint is not None or task.file is not None) and not self.worker.has_trained

    @property
    def accumulate_grad_batches(self) -> int:
        return self.worker.data.accumulate

    # ---- loaders

    @property
    def train_dataloader(self) -> Loader:
        return self.worker.data.loader

    @property
    def val_dataloaders(self) -> Loader:
        return self._given("validate")

    @property
    def test_dataloaders(self) -> Loader:
        return self._given("test")

    @property
    def predict_dataloaders(self) -> Loader:
        return self._given("predict")

    def _given(self, stage: str) -> Loader:
        data = self.worker.evaluation_data.get(stage)
        return data.given if data is not None else None

    @property
    def num_training_batches(self) -> int | float:
        return _or_inf(self.worker.data.num_batches)

    @property
    def num_val_batches(self) -> list[int | float]:
        return self._count("validate")

    @property
    def num_test_batches(self) -> list[int | float]:
        return self._count("test")

    @property
    def num_predict_batches(self) -> list[int | float]:
        return self._count("predict")

    def _count(self, stage: str) -> list[int | float]:
        data = self.worker.evaluation_data.get(stage)
        return [_or_inf(count) for count in data.num_batches] if data is not None else []

    def find_samples(self, dataloader_idx: int, batch_idx: int) -> list[Index] | None:
        return self.worker.evaluation_data[self.worker.stage].batches[dataloader_idx].find_samples(batch_idx)

    @property
    def estimated_stepping_batches(self) -> int | float:
        config, data = self.worker.config, self.worker.data
        if data.batches is None and self.worker.is_fitting:
            self.worker.open_training_data()
        batches = data.num_batches
        if config.max_epochs == -1 or config.max_epochs is None or batches is None:
            return config.max_steps if config.max_steps != -1 else float("inf")
        steps = -(-batches // data.accumulate) * max(config.max_epochs, 1)
        return min(steps, config.max_steps) if config.max_steps != -1 else steps

    # ---- what was logged

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        return CallbackMetrics(self.worker.metrics.newest(), self.worker.metrics.keep)

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self.worker.metrics.logged().items()}

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        return self.worker.metrics.shown()

    def log_hyperparameters(self, values: StateDict) -> None:
        self.worker.outbox.put(Hyperparameters(values))

    # ---- what hooks may do

    def request_stop(self, should_stop: bool) -> None:
        self.worker.request_stop(should_stop)

    def set_accumulate_grad_batches(self, count: int) -> None:
        self.worker.data.accumulate_over(count)

    def replace_optimizers(self, optimizers: list[Optimizer]) -> None:
        if self.loop is not None:
            raise RuntimeError("trainer.optimizers can be replaced until on_train_start; add parameter groups instead")
        self.worker.optimizers.take(optimizers, self.worker.optimizers.schedulers)

    def add_notice(self, text: str, level: str = "info") -> None:
        self.worker.outbox.notice(text, level)

    def request_checkpoint(self) -> None:
        self.worker.saving.request()

    def save_checkpoint(self, path: FilePath, weights_only: bool, storage_options: Value) -> None:
        step = self.step
        batch = step.batch.index if step is not None and step.batch is not None and step.is_done else None
        io = find_checkpoint_io(self.worker.config.plugins)
        save_run(self.worker, io, path, weights_only, batch, step is None or not step.window, storage_options)

    def order_file(self, order: FileOrder) -> None:
        if isinstance(order, FileWanted) and self.step is not None and self.step.window:
            self.save_checkpoint(order.path, order.weights_only, None)  # checkpoints lie between two optimizer steps
        else:
            self.worker.saving.order(order)

    def is_file_wanted(self, path: str) -> bool | None:
        return self.worker.saving.is_wanted(path)

    def finish_copying(self) -> None:
        self.worker.saving.finish_copying()

    def manual_backward(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        if self.step is None or self.worker.module.automatic_optimization:
            raise RuntimeError(
                "manual_backward is for modules with automatic_optimization = False, inside training_step"
            )
        self.step.backward_manually(loss, *arguments, **keywords)

    def forward_training_epoch(self, skip_uneven: bool) -> None:
        if self.loop is None:
            raise InvalidArguments(f"the training data cannot be gone through: {NO_RUN}")
        self.loop.forward_epoch(skip_uneven)

    def barrier(self) -> None:
        self.worker.barrier()

    def broadcast(self, value: Value, src: int) -> Value:
        return broadcast_object(value, self.worker.world_size, src)

    def all_gather(self, data: Value, group: ProcessGroup, sync_grads: bool) -> Value:
        return all_gather(data, self.worker.world_size, group, sync_grads)

    def reduce(self, tensor: Tensor | float, group: ProcessGroup, reduce_op: str) -> Tensor:
        tensor = torch.as_tensor(tensor, device=self.worker.device)
        return reduce_tensor(tensor, self.worker.world_size, group, is_mean=reduce_op in ("mean", "avg"))


def _or_inf(count: int | None) -> int | float:
    return float("inf") if count is None else count
