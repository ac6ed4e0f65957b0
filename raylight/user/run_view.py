"""What a trainer knows of a run: read from whoever owns each fact, or from what a run has left."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from raylight.contract.config import FilePath
from raylight.contract.kinds import Index, Loader, ProcessGroup, Scheduler, Value
from raylight.user.states import RunningStage, TrainerStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from raylight.contract.messages import FileOrder
    from raylight.contract.task import Files


Count = int | float | None
"""Batches of a loader; `inf` where the data has no length, None where no loader was opened yet."""


class SchedulerEntry(Protocol):
    """A learning rate scheduler and when it steps: every `frequency` "step"s or "epoch"s."""

    scheduler: Scheduler
    interval: str
    frequency: int
    monitor: str | None
    strict: bool
    name: str | None
    reduce_on_plateau: bool


class RunView(Protocol):
    """The facts of one run. The worker implements it while a run is on; `Record` holds what is left of one."""

    @property
    def stage(self) -> RunningStage | None:
        """The loop that runs now; None between two runs."""

    @property
    def status(self) -> TrainerStatus:
        """How the newest call of the trainer stands."""

    @property
    def world_size(self) -> int:
        """Number of workers."""

    @property
    def global_rank(self) -> int:
        """This worker among all, from 0."""

    @property
    def local_rank(self) -> int:
        """This worker among those of its node."""

    @property
    def node_rank(self) -> int:
        """This worker's node among all."""

    @property
    def num_nodes(self) -> int:
        """Number of nodes that hold workers."""

    @property
    def device(self) -> torch.device:
        """The device of this worker."""

    @property
    def attempt(self) -> int:
        """0, and one more each time the run is continued."""

    @property
    def seed(self) -> int | None:
        """The seed that the order of samples follows."""

    @property
    def module(self) -> nn.Module | None:
        """The module that is trained or evaluated."""

    @property
    def datamodule(self) -> Any | None:
        """The data module that was passed."""

    @property
    def callbacks(self) -> list[Any]:
        """All callbacks, those of `configure_callbacks` included once the run has begun."""

    @property
    def loggers(self) -> list[Any]:
        """In a hook, an object for each logger of the run, which acts for it."""

    @property
    def log_dir(self) -> str | None:
        """The version directory, as path or URI."""

    @property
    def files(self) -> Files | None:
        """The version directory as storage; None if nothing is written."""

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint that the run was started from."""

    @property
    def current_epoch(self) -> int:
        """Finished epochs of training."""

    @property
    def global_step(self) -> int:
        """Optimizer steps made so far."""

    @property
    def batch_idx(self) -> int:
        """Finished batches of this worker in the epoch."""

    @property
    def num_batches_seen(self) -> int:
        """Finished batches of this worker in the run."""

    @property
    def has_batch(self) -> bool:
        """Whether a batch of training is in hand: its first hook has begun, its last has not ended."""

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch in hand is the last of the epoch of training."""

    @property
    def should_stop(self) -> bool:
        """Whether training was asked to end."""

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run, or is about to."""

    @property
    def is_resuming(self) -> bool:
        """Whether the run goes on from a checkpoint and has not made a step since."""

    @property
    def optimizers(self) -> list[Optimizer]:
        """What `configure_optimizers` returned."""

    @property
    def lr_scheduler_configs(self) -> Sequence[SchedulerEntry]:
        """The schedulers that `configure_optimizers` returned, and when each steps."""

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches in one optimizer step."""

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of 16-bit training, else None."""

    @property
    def train_dataloader(self) -> Loader:
        """The training loader as the user gave it; None before it is asked for."""

    @property
    def val_dataloaders(self) -> Loader:
        """The validation loaders as the user gave them; None before they are asked for."""

    @property
    def test_dataloaders(self) -> Loader:
        """The test loaders as the user gave them; None before they are asked for."""

    @property
    def predict_dataloaders(self) -> Loader:
        """The prediction loaders as the user gave them; None before they are asked for."""

    @property
    def num_training_batches(self) -> int | float:
        """Batches of this worker in an epoch; `inf` where the data has no length."""

    @property
    def num_val_batches(self) -> list[int | float]:
        """Batches of each validation loader, over all workers."""

    @property
    def num_test_batches(self) -> list[int | float]:
        """Batches of each test loader, over all workers."""

    @property
    def num_predict_batches(self) -> list[int | float]:
        """Batches of each prediction loader, over all workers."""

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that the whole fit will make; `inf` where the data or the run has no end."""

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The newest value of everything logged. Epoch values are equal on all ranks; a step value is this rank's own
        until the epoch ends. Reading it waits for the device. A hook may set values of its own in it."""

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The newest value of everything that went to the loggers."""

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The newest value of everything logged with `prog_bar=True`."""

    def request_stop(self, should_stop: bool) -> None:
        """Ends training after the present batch, once the minimum of epochs and steps is reached."""

    def set_accumulate_grad_batches(self, count: int) -> None:
        """From the next step on."""

    def replace_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Trains with these instead."""

    def add_notice(self, text: str, level: str = "info") -> None:
        """Something that the person should read, once; `level` is "info" or "warning"."""

    def request_checkpoint(self) -> None:
        """Saves at the end of this step. Call it on every rank at the same step."""

    def save_checkpoint(self, path: FilePath, weights_only: bool, storage_options: Value) -> None:
        """Writes one file with the present state to `path`. Call it on every rank at the same step."""

    def order_file(self, order: FileOrder) -> None:
        """Asks for a file with the present state, a link or a deletion; done in this order, behind the loop. Call it on
        every rank at the same step."""

    def is_file_wanted(self, path: str) -> bool | None:
        """Whether a file that was asked for will be at this path; None if nobody asked for one there."""

    def manual_backward(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        """Backward under the run's precision, with gradients averaged over the ranks."""

    def log(
        self, name: str, value: Value, prog_bar: bool, logger: bool | None, on_step: bool | None, on_epoch: bool | None,
        reduce_fx: Value, add_dataloader_idx: bool, batch_size: Value, metric_attribute: str | None,
    ) -> None:  # fmt: skip
        """Keeps a value that a hook has logged; the arguments are those of `Module.log`."""

    def log_hyperparameters(self, values: dict[str, Value]) -> None:
        """Adds to what the run records."""

    @property
    def stepping_optimizers(self) -> list[Any]:
        """The optimizers as manual optimization sees them: a step is counted, scaled and told to the hooks."""

    def find_samples(self, dataloader_idx: int, batch_idx: int) -> list[Index] | None:
        """The samples of a batch of the evaluation that is on, as indices into the loader's dataset; None where the
        data has no indices."""

    def finish_copying(self) -> None:
        """Returns once no checkpoint copies weights and optimizer state any more, so that they may be changed."""

    def forward_training_epoch(self, skip_uneven: bool) -> None:
        """Calls training_step on each of this rank's batches; what it logs is dropped. With `skip_uneven` a batch that
        some rank lacks is left out."""

    def barrier(self) -> None:
        """Returns once every rank has called it."""

    def broadcast(self, value: Value, src: int) -> Value:
        """The value of rank `src`, on every rank."""

    def all_gather(self, data: Value, group: ProcessGroup, sync_grads: bool) -> Value:
        """Tensors of all ranks, stacked."""

    def reduce(self, tensor: Tensor | float, group: ProcessGroup, reduce_op: str) -> Tensor:
        """The mean or sum over all ranks."""


NO_RUN = "there is no run: this works in a hook, while the trainer fits, validates, tests or predicts"
IN_WORKERS = "{} stayed in the workers: read it in a hook, or from the last checkpoint (Result.last_checkpoint)"
LIVE = ("optimizers", "lr_scheduler_configs", "stepping_optimizers", "scaler")
"""Facts that are objects of the run itself; after a run on workers they are not here."""
PLAIN = (
    "stage", "status", "world_size", "num_nodes", "attempt", "seed", "ckpt_path", "current_epoch", "global_step",
    "batch_idx", "num_batches_seen", "should_stop", "accumulate_grad_batches", "num_training_batches",
    "num_val_batches", "num_test_batches", "num_predict_batches", "estimated_stepping_batches", "callback_metrics",
    "logged_metrics", "progress_bar_metrics",
)  # fmt: skip
"""Facts that can be sent from a worker."""


@dataclass
class Record:
    """A run seen from outside: before it nothing but defaults, after it what it has left."""

    callbacks: list[Any] = field(default_factory=list)
    loggers: list[Any] = field(default_factory=list)
    stage: RunningStage | None = None
    status: TrainerStatus = TrainerStatus.INITIALIZING
    world_size: int = 1
    global_rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    num_nodes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    attempt: int = 0
    seed: int | None = None
    module: nn.Module | None = None
    datamodule: Any | None = None
    log_dir: str | None = None
    files: Files | None = None
    ckpt_path: str | None = None
    current_epoch: int = 0
    global_step: int = 0
    batch_idx: int = 0
    num_batches_seen: int = 0
    has_batch: bool = False
    is_last_batch: bool = False
    should_stop: bool = False
    is_resuming: bool = False
    accumulate_grad_batches: int = 1
    train_dataloader: Loader = None
    val_dataloaders: Loader = None
    test_dataloaders: Loader = None
    predict_dataloaders: Loader = None
    num_training_batches: int | float = float("inf")
    num_val_batches: list[int | float] = field(default_factory=list)
    num_test_batches: list[int | float] = field(default_factory=list)
    num_predict_batches: list[int | float] = field(default_factory=list)
    estimated_stepping_batches: int | float = float("inf")
    callback_metrics: dict[str, Tensor] = field(default_factory=dict)
    logged_metrics: dict[str, Tensor] = field(default_factory=dict)
    progress_bar_metrics: dict[str, float] = field(default_factory=dict)
    optimizers: list[Optimizer] = field(default_factory=list)
    lr_scheduler_configs: Sequence[SchedulerEntry] = ()
    stepping_optimizers: list[Any] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None

    @property
    def interrupted(self) -> bool:
        return self.status is TrainerStatus.INTERRUPTED

    def request_stop(self, should_stop: bool) -> None:
        self.should_stop = should_stop

    def set_accumulate_grad_batches(self, count: int) -> None:
        self.accumulate_grad_batches = count

    def replace_optimizers(self, optimizers: list[Optimizer]) -> None:
        raise RuntimeError(NO_RUN)

    def add_notice(self, text: str, level: str = "info") -> None:
        raise RuntimeError(NO_RUN)

    def request_checkpoint(self) -> None:
        raise RuntimeError(NO_RUN)

    def save_checkpoint(self, path: FilePath, weights_only: bool, storage_options: Value) -> None:
        raise RuntimeError(NO_RUN)

    def order_file(self, order: FileOrder) -> None:
        raise RuntimeError(NO_RUN)

    def is_file_wanted(self, path: str) -> bool | None:
        return None

    def manual_backward(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        raise RuntimeError(NO_RUN)

    def log(self, name: str, value: Value, *options: Any) -> None:
        """Outside a run nothing is logged, as in Lightning."""

    def log_hyperparameters(self, values: dict[str, Value]) -> None:
        for logger in self.loggers:
            logger.log_hyperparams(values)

    def find_samples(self, dataloader_idx: int, batch_idx: int) -> list[Index] | None:
        return None

    def finish_copying(self) -> None:
        """Nothing is copied."""

    def forward_training_epoch(self, skip_uneven: bool) -> None:
        raise RuntimeError(NO_RUN)

    def barrier(self) -> None:
        """Nobody to wait for."""

    def broadcast(self, value: Value, src: int) -> Value:
        return value

    def all_gather(self, data: Value, group: ProcessGroup, sync_grads: bool) -> Value:
        return data

    def reduce(self, tensor: Tensor | float, group: ProcessGroup, reduce_op: str) -> Tensor:
        return torch.as_tensor(tensor)


class WorkersRecord(Record):
    """What a run on workers has left; asking for an object that was theirs says where it is."""

    def __getattribute__(self, name: str) -> Value:
        if name in LIVE:
            raise AttributeError(IN_WORKERS.format(f"trainer.{name}"))
        return super().__getattribute__(name)


def facts_of(view: RunView) -> dict[str, Value]:
    """Everything that a `Record` holds, live objects included, as it is now."""
    return {item.name: getattr(view, item.name) for item in fields(Record)}
