"""The hooks of a Module, with what each does if nobody overrides it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from raylight.contract.kinds import Batch, Output, Value
from raylight.user.data_hooks import CheckpointHooks, DataHooks

Callbacks: TypeAlias = Any
"""A Callback, a sequence of them, or None; their class lies above this one."""
OptimizerSetup: TypeAlias = Any
"""The forms that `configure_optimizers` may return."""
Stepping: TypeAlias = Any
"""An optimizer or a scheduler as the user's code calls it: torch's, or an object with the same methods."""


class ModuleHooks(DataHooks, CheckpointHooks, nn.Module):
    """Each runs on every worker, after the callbacks' hooks of the same name; an exception in one ends the run."""

    # ---- hooks that define the training

    def training_step(self, *args: Batch, **kwargs: Batch) -> Output:
        """Compute the loss of one batch: a scalar tensor with a gradient, a dict with it as "loss", or None to skip it
        (on one worker only)."""
        raise NotImplementedError(f"{type(self).__name__} has no training_step(self, batch, batch_idx)")

    def validation_step(self, *args: Batch, **kwargs: Batch) -> Output:
        """Evaluate one batch of validation, in evaluation mode and without gradients; log the metrics here."""

    def test_step(self, *args: Batch, **kwargs: Batch) -> Output:
        """Evaluate one batch of a test, as `validation_step`."""

    def predict_step(self, *args: Batch, **kwargs: Batch) -> Output:
        """Compute what `predict` collects for a batch; by default `forward` of the batch, or of its first item."""
        batch = kwargs["batch"] if "batch" in kwargs else args[0]
        return self(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def configure_optimizers(self) -> OptimizerSetup:
        """Make an optimizer, a list of them, `([optimizers], [schedulers])`, or a dict with "optimizer" and
        "lr_scheduler" (a scheduler, or a dict with "scheduler", "interval", "frequency", "monitor", "name").

        Called once on each worker of a fit; the module is on its device and has a checkpoint's weights.
        """
        raise NotImplementedError(f"{type(self).__name__} has no configure_optimizers(self)")

    def configure_model(self) -> None:
        """Make large or sharded layers, on every worker, after `setup` and before weights are loaded."""

    def configure_callbacks(self) -> Callbacks:
        """Make callbacks that belong to this module; one replaces those of its type that the trainer has."""
        return []

    # ---- hooks around the loops

    def on_fit_start(self) -> None:
        """Called before the sanity check; optimizers exist, and of a checkpoint the weights alone are loaded yet."""

    def on_fit_end(self) -> None:
        """Called once after training, before `teardown`."""

    def on_train_start(self) -> None:
        """Called before the first epoch, and again after a lost worker was replaced."""

    def on_train_end(self) -> None:
        """Called after the last epoch; the last checkpoint is already on storage."""

    def on_validation_start(self) -> None:
        """Called before each validation, the sanity check included; the module is in evaluation mode."""

    def on_validation_end(self) -> None:
        """Called after each validation, once its values are reduced over all workers."""

    def on_test_start(self) -> None:
        """Called before each test; the module is in evaluation mode."""

    def on_test_end(self) -> None:
        """Called after each test, once its values are reduced over all workers."""

    def on_predict_start(self) -> None:
        """Called before each prediction; the module is in evaluation mode."""

    def on_predict_end(self) -> None:
        """Called after each prediction."""

    def on_train_epoch_start(self) -> None:
        """Called before each epoch's first batch; not if the run continues in the middle of that epoch."""

    def on_train_epoch_end(self) -> None:
        """Called after each epoch of training; may log epoch values."""

    def on_validation_epoch_start(self) -> None:
        """Called after `on_validation_start`, before the first batch."""

    def on_validation_epoch_end(self) -> None:
        """Called after the last batch of all loaders; may log epoch values."""

    def on_test_epoch_start(self) -> None:
        """Called after `on_test_start`, before the first batch."""

    def on_test_epoch_end(self) -> None:
        """Called after the last batch of all loaders; may log epoch values."""

    def on_predict_epoch_start(self) -> None:
        """Called after `on_predict_start`, before the first batch."""

    def on_predict_epoch_end(self) -> None:
        """Called after the last batch of all loaders."""

    def training_epoch_end(self, outputs: list[Output]) -> None:
        """Called before `on_train_epoch_end` with the epoch's step outputs of all workers, in dataset order."""

    def validation_epoch_end(self, outputs: list[Output]) -> None:
        """Called before `on_validation_epoch_end` with the step outputs of all workers, in dataset order; a list
        for each loader if there are several."""

    def test_epoch_end(self, outputs: list[Output]) -> None:
        """Called before `on_test_epoch_end` with the step outputs of all workers, in dataset order; a list
        for each loader if there are several."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        """Called before each training batch, which is on the device; return -1 to skip the rest of the epoch."""

    def on_train_batch_end(self, outputs: Output, batch: Batch, batch_idx: int) -> None:
        """Called after each training batch; `outputs` is a dict with the detached "loss"."""

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before each validation batch; `batch_idx` counts the batches of all workers."""

    def on_validation_batch_end(self, outputs: Output, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after each validation batch; `outputs` is what validation_step returned."""

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before each test batch; `batch_idx` counts the batches of all workers."""

    def on_test_batch_end(self, outputs: Output, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after each test batch; `outputs` is what test_step returned."""

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before each prediction batch; `batch_idx` counts the batches of all workers."""

    def on_predict_batch_end(self, outputs: Output, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after each prediction batch; `outputs` is what predict_step returned."""

    def on_validation_model_zero_grad(self) -> None:
        """Free the gradients; called before each validation inside a fit, the sanity check excepted."""
        self.zero_grad()

    def on_validation_model_eval(self) -> None:
        """Switch to evaluation mode; called before `on_validation_start`."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Restore the mode that each submodule had before; called after `on_validation_end`."""
        self._restore_modes()

    def on_test_model_eval(self) -> None:
        """Switch to evaluation mode; called before `on_test_start`."""
        self.eval()

    def on_test_model_train(self) -> None:
        """Restore the mode that each submodule had before; called after `on_test_end`."""
        self._restore_modes()

    def on_predict_model_eval(self) -> None:
        """Switch to evaluation mode; called before `on_predict_start`."""
        self.eval()

    def _remember_modes(self) -> None:
        self.__dict__["_modes"] = {module: module.training for module in self.modules()}

    def _restore_modes(self) -> None:
        for module, training in self.__dict__.pop("_modes", {}).items():
            module.training = training

    # ---- hooks around one optimizer step

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Called after training_step and before the first backward pass of each optimizer step."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Called before each backward pass; `loss` is a scalar, not yet divided by `accumulate_grad_batches`."""

    def on_after_backward(self) -> None:
        """Called after each backward pass; with precision "16-mixed" gradients are still scaled."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called before each optimizer step; gradients are averaged and unscaled, not yet clipped."""

    def backward(self, loss: Tensor, *args: Value, **kwargs: Value) -> None:
        """Compute the gradients of `loss`, which is divided by `accumulate_grad_batches` and scaled already."""
        loss.backward(*args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Stepping, optimizer_closure: Callable[[], Output] | None = None
    ) -> None:
        """Make the step. `optimizer_closure` runs training_step, zero_grad and backward: call it, or pass it to
        `optimizer.step`, exactly once."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Drop the gradients of the step before."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Stepping, metric: Value) -> None:
        """Step a scheduler; `metric` is the value that it monitors, None for those that monitor none."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self, optimizer: Stepping, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients before a step; the arguments are the trainer's, to be passed to `clip_gradients`."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self, optimizer: Stepping, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of `optimizer` by their common "norm", or each "value"; None clips nothing."""
        if gradient_clip_val is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if (gradient_clip_algorithm or "norm") == "norm":
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
