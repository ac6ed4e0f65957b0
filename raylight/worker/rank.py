"""Rank: one worker's view of a run, and what hooks and callbacks receive as `trainer` in every mode."""

from __future__ import annotations

import inspect
import itertools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raylight.contract.errors import DataError
from raylight.contract.messages import Message, Notice
from raylight.contract.task import Place, Task
from raylight.user.callback import Callback
from raylight.user.module import Module
from raylight.worker.checkpoint.snapshot import Snapshots
from raylight.worker.diagnosis.profiler import make_profiler
from raylight.worker.group.collectives import all_gather, broadcast_object
from raylight.worker.group.control import Control
from raylight.worker.metrics.logger_proxy import LoggerProxy
from raylight.worker.metrics.metrics import Metrics
from raylight.worker.step.moving_buffers import MovingBuffers
from raylight.worker.step.optimizers import SchedulerConfig
from raylight.worker.step.precision import make_precision
from raylight.worker.trainer_names import TrainerNames

HOOK_PREFIX = {"sanity": "validation", "validate": "validation", "test": "test", "predict": "predict"}

class Rank(TrainerNames):
    """State of one worker. Attributes that Lightning's Trainer has too mean the same here."""

    def __init__(self, task: Task, place: Place, control: Control):
        self.task, self.place, self.control, self.config = task, place, control, task.config
        self.module: Any = task.module
        self.datamodule = task.loaders.data_module
        self.callbacks: list[Any] = list(task.callbacks)
        self.device = torch.device(place.device)
        self.stage = "train" if task.stage == "fit" else task.stage
        self.precision_plugin = make_precision(self.config.precision, self.device.type, plugins=self.config.plugins)
        self.metrics = Metrics(self.module, place.world_size)
        self.profiler = make_profiler(self.config.profiler, trace_path=self._trace_path())
        self.snapshots: Snapshots | None = None
        self.outbox: list[Message] = []
        self.unsaved_hyperparameters: set[str] = set()
        self.logger = LoggerProxy(self) if self.config.logger is not False else None
        # what configure_optimizers returned
        self.optimizers: list[torch.optim.Optimizer] = []
        self.stepping_optimizers: list[Any] = []
        self.lr_scheduler_configs: list[SchedulerConfig] = []
        self.configured: dict[str, list[Any]] = {}  # their options before the first step
        # where the run is: all of it is in every checkpoint
        self.current_epoch = 0
        self.global_step = 0
        self.batch_idx = 0  # finished batches of this rank in the epoch
        self.num_batches_seen = 0  # finished batches of this rank in the run
        self.position = 0  # samples of the epoch that all ranks have consumed
        self.validated_at = -1  # num_batches_seen at the newest validation
        self.outputs: list[Any] = []  # of the epoch's steps, where training_epoch_end wants them
        self.saved_step = -1  # of the newest snapshot
        self.has_trained = False  # its state is that of the run, not only of its start
        self.should_stop = False
        self.said_not_finite = False
        self.status = "finished"
        self.seconds: dict[str, float] = {}
        self.restored: Any = None
        self.restored_rng: dict[str, Any] | None = None  # to be put in place just before the first step
        self.checkpoint_requested = False
        self.accumulate_grad_batches = self.config.accumulate_grad_batches
        # data, found when the loop begins
        self.train_batches: Any = None
        self.gradients: Any = None  # the loop's, while it trains
        self.batch: Any = None  # in hand, from before its first hook to after its last
        self.batch_done = False  # its step is made, and only what comes behind it is not
        self.suspect: int | None = None  # index of a finished batch whose loss was not finite
        self.torch_rng: Tensor | None = None  # before that batch, where steps have no random numbers of their own
        self.moving_buffers: MovingBuffers | None = None  # as they were before that step
        self.window_rng: Tensor | None = None  # before the first batch since the last optimizer step
        self.train_dataloader: Any = None
        self.val_dataloaders: Any = None
        self.num_training_batches: int | None = None
        self.num_val_batches: list[int | None] = []
        self.evaluation_batches: list[Any] = []
        self.evaluation_results: list[dict[str, float]] = []
        self.evaluation_outputs: list[list[tuple[int, Any]]] = []
        self._hooks: dict[str, tuple[Callable[..., Any], ...]] = {}
        self._step_manually: Callable[..., Any] | None = None
        self.backward_manually: Callable[..., Any] | None = None
        self._attach()

    def _trace_path(self) -> str:
        local = self.task.files.local_path("") if self.task.files is not None else None
        return os.path.join(local or tempfile.gettempdir(), f"trace-rank-{self.place.rank}.json")

    def _attach(self) -> None:
        self.module.trainer = self
        if self.datamodule is not None:
            self.datamodule.trainer = self

    # ---- hooks: found once, and those that nobody overrode are not called at all

    def hooks(self, name: str) -> tuple[Callable[..., Any], ...]:
        """The callbacks' overrides of a hook, then the module's, bound and ready to be called."""
        found = self._hooks.get(name)
        if found is None:
            found = (*self.callback_hooks(name), *self.module_hook(name))
            self._hooks[name] = found
        return found

    def callback_hooks(self, name: str, callbacks: list[Any] | None = None) -> tuple[Callable[..., Any], ...]:
        """Of these callbacks, or of all."""
        callbacks = self.callbacks if callbacks is None else callbacks
        return tuple(_bind(callback, name, self) for callback in callbacks if _overrides(callback, name, Callback))

    def hooks_at_epoch_end(self) -> list[tuple[Callable[..., Any], ...]]:
        """`on_train_epoch_end` in two turns: callbacks that judge values come after all that logs some."""
        last = [callback for callback in self.callbacks if getattr(callback, "judges_values", False)]
        first = [callback for callback in self.callbacks if callback not in last]
        name = "on_train_epoch_end"
        turns = ((*self.callback_hooks(name, first), *self.module_hook(name)), self.callback_hooks(name, last))
        return [turn for turn in turns if turn]

    def module_hook(self, name: str) -> tuple[Callable[..., Any], ...]:
        return (getattr(self.module, name),) if self.overrides(name) else ()

    def overrides(self, name: str) -> bool:
        return _overrides(self.module, name, Module)

    def call(self, name: str, *arguments: Any) -> None:
        for hook in self.hooks(name):
            hook(*arguments)

    def add_callbacks(self, callbacks: Any) -> None:
        """A callback of configure_callbacks takes the place of one of the same type."""
        added = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        kinds = {type(callback) for callback in added}
        self.callbacks = [c for c in self.callbacks if type(c) not in kinds] + added
        self._hooks.clear()

    # ---- what hooks may do

    def notice(self, text: str, level: str = "info") -> None:
        """Tells the person something, once, through the driver."""
        self.outbox.append(Notice(text, level))

    def take_outbox(self) -> list[Message]:
        taken, self.outbox = self.outbox, []
        return taken

    def request_checkpoint(self) -> None:
        """Saves at the end of this step. Call it on every rank at the same step."""
        self.checkpoint_requested = True

    def barrier(self, name: str | None = None) -> None:
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: Any, src: int = 0) -> Any:
        return broadcast_object(value, self.world_size, src)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        return all_gather(data, self.world_size, group, sync_grads)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: str = "mean") -> Tensor:
        """The mean over all ranks, or with "sum" the sum."""
        tensor = torch.as_tensor(tensor, device=self.device)
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=group)
            tensor = tensor / self.world_size if reduce_op in ("mean", "avg") else tensor
        return tensor

    def manual_backward(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        if self.backward_manually is None:
            raise RuntimeError(
                "manual_backward is for modules with automatic_optimization = False, inside training_step"
            )
        self.backward_manually(loss, *arguments, **keywords)

    # ---- loaders

    def loader(self, stage: str) -> Any:
        """What the caller passed for this stage, else the data module's hook, else the module's; None where none."""
        name = "val" if stage == "validate" else stage
        given = getattr(self.task.loaders, stage)
        if given is not None:
            return given
        for owner in (self.datamodule, self.module):
            hook = getattr(owner, f"{name}_dataloader", None)
            loader = hook() if hook is not None else None
            if loader is not None:
                return loader
        return None

    def evaluation_loaders(self, stage: str) -> list[Any]:
        loader = self.loader(stage)
        if loader is None:
            return []
        if isinstance(loader, dict):
            return list(loader.values())
        return list(loader) if isinstance(loader, (list, tuple)) else [loader]

    def transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """The batch on this rank's device and in its precision, through the user's hooks where there are any."""
        for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            owner = self._transfer_owner(name)
            if owner is None and name == "transfer_batch_to_device":
                owner = self.module
            if owner is not None:
                device = (self.device,) if name == "transfer_batch_to_device" else ()
                batch = getattr(owner, name)(batch, *device, dataloader_idx)
        return self.precision_plugin.convert_batch(batch)

    def _transfer_owner(self, name: str) -> Any:
        if self.datamodule is not None and _overrides(self.datamodule, name, _data_module_class()):
            return self.datamodule
        return self.module if self.overrides(name) else None

    @property
    def transfers(self) -> bool:
        """Whether a batch needs anything before the step: on a CPU, without hooks, in plain precision, it does not."""
        names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        hooked = any(self._transfer_owner(name) is not None for name in names)
        return hooked or self.device.type != "cpu" or not self.precision_plugin.is_plain


def bind_step(function: Callable[..., Any], several: bool = False) -> Callable[[Any, int, int], Any]:
    """A step that takes (batch), (batch, batch_idx) or all three, as a function of all three; `*args` get the third
    only where there are `several` loaders."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return function if several else lambda batch, batch_idx, dataloader_idx: function(batch, batch_idx)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not names:
        raise DataError(f"{function.__qualname__} takes no batch; its signature is (self, batch, batch_idx)")
    if len(names) == 1:
        return lambda batch, batch_idx, dataloader_idx: function(batch)
    if len(names) == 2:
        if names[1] == "dataloader_idx":
            return lambda batch, batch_idx, dataloader_idx: function(batch, dataloader_idx)
        return lambda batch, batch_idx, dataloader_idx: function(batch, batch_idx)
    return function


def takes_outputs(hook: Callable[..., Any]) -> bool:
    """Whether an `..._epoch_end` hook wants the outputs, or is called bare."""
    return bool(inspect.signature(hook).parameters)


def _overrides(owner: Any, name: str, ancestor: type) -> bool:
    hook = getattr(owner, name, None)
    return hook is not None and getattr(hook, "__func__", hook) is not getattr(ancestor, name, None)


def _bind(callback: Any, name: str, rank: Rank) -> Callable[..., Any]:
    hook = getattr(callback, name)
    return lambda *arguments: hook(rank, rank.module, *arguments)


def _data_module_class() -> type:
    from raylight.user.data_module import DataModule

    return DataModule


def interleave(shares: list[list[Any]]) -> list[Any]:
    """Items of all ranks in dataset order, where rank r holds every world_size-th from r on."""
    missing = object()
    rounds = itertools.zip_longest(*shares, fillvalue=missing)
    return [item for turn in rounds for item in turn if item is not missing]
