"""Callback: code that runs at the hooks of a run, on every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylight.contract.kinds import Batch, Output, Value

if TYPE_CHECKING:
    import torch

    from raylight.contract.config import Config
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


class Callback:
    """Subclass it and override the hooks you need; the others cost nothing.

    A callback object is copied to every worker and called there with `trainer`, an object of the caller's class of
    trainer, and the user's module. After `fit` the caller's own object holds rank 0's attributes. A hook of a callback
    runs before the module's hook of the same name. An exception in a hook ends the run.
    """

    _judges_values = False
    """Run `on_train_epoch_end` after the module's own, which may log the values that are judged there."""

    _comes_last = False
    """Run every hook after those of the other callbacks, whose state it saves."""

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; override it if a run has several of one class."""
        return type(self).__qualname__

    def _generate_state_key(self, **distinguishing: Value) -> str:
        """A `state_key` of the class and what tells several of it apart, as Lightning writes it."""
        return f"{type(self).__qualname__}{distinguishing!r}"

    def _find_mistakes(self, config: Config) -> list[str]:
        """Conflicts with the trainer's arguments, one sentence each; called before any worker starts."""
        return []

    def state_dict(self) -> dict[str, Value]:
        """State for every checkpoint: plain values and tensors only."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Value]) -> None:
        """Restore what `state_dict` returned; called after `on_fit_start` if the run continues from a checkpoint."""

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        """Prepare for a stage, on every worker; `stage` is "fit", "validate", "test" or "predict"."""

    def teardown(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        """Release what `setup` made; called last on every worker. `stage` is as in `setup`."""

    def on_fit_start(self, trainer: TrainerNames, module: Module) -> None:
        """Called before the sanity check; optimizers exist, and of a checkpoint the weights alone are loaded yet."""

    def on_fit_end(self, trainer: TrainerNames, module: Module) -> None:
        """Called once after training, before `teardown`."""

    def on_sanity_check_start(self, trainer: TrainerNames, module: Module) -> None:
        """Called before the validation batches that are tried before training."""

    def on_sanity_check_end(self, trainer: TrainerNames, module: Module) -> None:
        """Called after the sanity check; the values that it logged are dropped."""

    def on_train_start(self, trainer: TrainerNames, module: Module) -> None:
        """Called before the first epoch, and again after a lost worker was replaced."""

    def on_train_end(self, trainer: TrainerNames, module: Module) -> None:
        """Called after the last epoch; the last checkpoint is already on storage."""

    def on_train_epoch_start(self, trainer: TrainerNames, module: Module) -> None:
        """Called before each epoch's first batch; not if the run continues in the middle of that epoch."""

    def on_train_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        """Called after each epoch of training; may log epoch values."""

    def on_train_batch_start(self, trainer: TrainerNames, module: Module, batch: Batch, batch_idx: int) -> int | None:
        """Called before each training batch, which is on the device; return -1 to skip the rest of the epoch."""

    def on_train_batch_end(
        self, trainer: TrainerNames, module: Module, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        """Called after each training batch; `outputs` is a dict with the detached "loss"."""

    def on_validation_start(self, trainer: TrainerNames, module: Module) -> None:
        """Called before each validation, the sanity check included; the module is in evaluation mode."""

    def on_validation_end(self, trainer: TrainerNames, module: Module) -> None:
        """Called after each validation, once its values are reduced over all workers."""

    def on_validation_epoch_start(self, trainer: TrainerNames, module: Module) -> None:
        """Called after `on_validation_start`, before the first batch."""

    def on_validation_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        """Called after the last batch of all loaders; may log."""

    def on_validation_batch_start(
        self, trainer: TrainerNames, module: Module, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each validation batch; `batch_idx` counts the batches of all workers."""

    def on_validation_batch_end(
        self,
        trainer: TrainerNames,
        module: Module,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after each validation batch; `outputs` is what validation_step returned."""

    def on_test_start(self, trainer: TrainerNames, module: Module) -> None:
        """Called before each test; the module is in evaluation mode."""

    def on_test_end(self, trainer: TrainerNames, module: Module) -> None:
        """Called after each test, once its values are reduced over all workers."""

    def on_test_epoch_start(self, trainer: TrainerNames, module: Module) -> None:
        """Called after `on_test_start`, before the first batch."""

    def on_test_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        """Called after the last batch of all loaders; may log."""

    def on_test_batch_start(
        self, trainer: TrainerNames, module: Module, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each test batch; `batch_idx` counts the batches of all workers."""

    def on_test_batch_end(
        self,
        trainer: TrainerNames,
        module: Module,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after each test batch; `outputs` is what test_step returned."""

    def on_predict_start(self, trainer: TrainerNames, module: Module) -> None:
        """Called before each prediction; the module is in evaluation mode."""

    def on_predict_end(self, trainer: TrainerNames, module: Module) -> None:
        """Called after each prediction."""

    def on_predict_epoch_start(self, trainer: TrainerNames, module: Module) -> None:
        """Called after `on_predict_start`, before the first batch."""

    def on_predict_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        """Called after the last batch of all loaders."""

    def on_predict_batch_start(
        self, trainer: TrainerNames, module: Module, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each prediction batch; `batch_idx` counts the batches of all workers."""

    def on_predict_batch_end(
        self,
        trainer: TrainerNames,
        module: Module,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after each prediction batch; `outputs` is what predict_step returned."""

    def on_before_zero_grad(self, trainer: TrainerNames, module: Module, optimizer: torch.optim.Optimizer) -> None:
        """Called after training_step and before the first backward pass of each optimizer step."""

    def on_before_backward(self, trainer: TrainerNames, module: Module, loss: torch.Tensor) -> None:
        """Called before each backward pass; `loss` is a scalar, not yet divided by `accumulate_grad_batches`."""

    def on_after_backward(self, trainer: TrainerNames, module: Module) -> None:
        """Called after each backward pass; with precision "16-mixed" gradients are still scaled."""

    def on_before_optimizer_step(self, trainer: TrainerNames, module: Module, optimizer: torch.optim.Optimizer) -> None:
        """Called before each optimizer step; gradients are averaged and unscaled, not yet clipped."""

    def on_save_checkpoint(self, trainer: TrainerNames, module: Module, checkpoint: dict[str, Value]) -> None:
        """Add to a checkpoint, on every worker alike: plain values and tensors only."""

    def on_load_checkpoint(self, trainer: TrainerNames, module: Module, checkpoint: dict[str, Value]) -> None:
        """Read or change a checkpoint before its weights are loaded, for evaluation too."""

    def on_exception(self, trainer: TrainerNames, module: Module, exception: BaseException) -> None:
        """Called on the worker that raised `exception`; an error in this hook becomes a note to it."""
