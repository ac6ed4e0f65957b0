"""Module: what the user subclasses. Its hooks carry Lightning's names, meanings and order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raylight.user.checkpoint_reader import checkpoint_reader
from raylight.user.init_arguments import choose_hyperparameters, collect_arguments
from raylight.user.trainer_names import TrainerNames
from raylight.user.transfer import move_to_device


class AttributeDict(dict[str, Any]):
    """A dict whose keys are attributes too: `hparams.lr` is `hparams["lr"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there are {sorted(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class Module(nn.Module):
    """A torch module that knows how to train itself.

    `training_step` and `configure_optimizers` are required to `fit`; every other hook is optional, and one that is
    not overridden costs nothing. A step takes `(batch)`, `(batch, batch_idx)` or `(batch, batch_idx,
    dataloader_idx)`. `training_step` returns the loss, a scalar tensor with a gradient, or a dict with it as "loss".
    """

    automatic_optimization: bool = True
    strict_loading: bool = True
    example_input_array: Any = None
    _trainer: TrainerNames | None
    _hparams: AttributeDict

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["_trainer"] = None
        self.__dict__.setdefault("_hparams", AttributeDict())

    # ---- where it runs

    @property
    def trainer(self) -> TrainerNames:
        """The trainer that runs this module: in this process the caller's own, on a worker one of the same class."""
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            raise RuntimeError(
                f"{type(self).__name__} is not attached to a run: `trainer` exists inside the hooks only."
            )
        return trainer

    @trainer.setter
    def trainer(self, trainer: TrainerNames | None) -> None:
        self.__dict__["_trainer"] = trainer

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in _tensors(self)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        floating = (tensor.dtype for tensor in _tensors(self) if tensor.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def current_epoch(self) -> int:
        return self._trainer.current_epoch if self._trainer else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps made so far."""
        return self._trainer.global_step if self._trainer else 0

    @property
    def global_rank(self) -> int:
        return self._trainer.global_rank if self._trainer else 0

    @property
    def local_rank(self) -> int:
        return self._trainer.local_rank if self._trainer else 0

    @property
    def logger(self) -> Any:
        return self._trainer.logger if self._trainer else None

    @property
    def loggers(self) -> list[Any]:
        return self._trainer.loggers if self._trainer else []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}

    # ---- hooks that define the training

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no training_step(self, batch, batch_idx)")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any: ...
    def test_step(self, *args: Any, **kwargs: Any) -> Any: ...

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Any:
        """What `predict` collects for a batch: by default the module called on it, or on its first item."""
        return self(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def configure_optimizers(self) -> Any:
        """An optimizer, a list of them, `([optimizers], [schedulers])`, or a dict with "optimizer" and
        "lr_scheduler" (a scheduler, or a dict with "scheduler", "interval", "frequency", "monitor", "name")."""
        raise NotImplementedError(f"{type(self).__name__} has no configure_optimizers(self)")

    def configure_model(self) -> None: ...
    def configure_callbacks(self) -> Any:
        return []

    def prepare_data(self) -> None: ...
    def setup(self, stage: str) -> None: ...
    def teardown(self, stage: str) -> None: ...
    def train_dataloader(self) -> Any: ...
    def val_dataloader(self) -> Any: ...
    def test_dataloader(self) -> Any: ...
    def predict_dataloader(self) -> Any: ...

    # ---- hooks around the loops

    def on_fit_start(self) -> None: ...
    def on_fit_end(self) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_epoch_end(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_test_epoch_start(self) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_predict_epoch_start(self) -> None: ...
    def on_predict_epoch_end(self) -> None: ...
    def training_epoch_end(self, outputs: list[Any]) -> None: ...
    def validation_epoch_end(self, outputs: list[Any]) -> None: ...
    def test_epoch_end(self, outputs: list[Any]) -> None: ...

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Return -1 to skip the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    def on_validation_model_zero_grad(self) -> None:
        """Called before a validation inside training; frees the gradients."""
        self.zero_grad()

    def on_validation_model_eval(self) -> None:
        self.eval()

    def on_validation_model_train(self) -> None:
        """Called after a validation. Restores each submodule's own mode, as it was before."""
        self._restore_modes()

    def on_test_model_eval(self) -> None:
        self.eval()

    def on_test_model_train(self) -> None:
        self._restore_modes()

    def on_predict_model_eval(self) -> None:
        self.eval()

    def _remember_modes(self) -> None:
        self.__dict__["_modes"] = {module: module.training for module in self.modules()}

    def _restore_modes(self) -> None:
        for module, training in self.__dict__.pop("_modes", {}).items():
            module.training = training

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_exception(self, exception: BaseException) -> None: ...

    # ---- hooks around one optimizer step

    def on_before_zero_grad(self, optimizer: Optimizer) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None: ...

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Makes the step. `optimizer_closure` runs training_step, zero_grad and backward: call it, or
        pass it to `optimizer.step`, exactly once."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips the gradients of `optimizer` by their common "norm", or each "value"."""
        if gradient_clip_val is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if (gradient_clip_algorithm or "norm") == "norm":
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)

    # ---- manual optimization

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or the list of them where there are several."""
        found = self.trainer.stepping_optimizers if use_pl_optimizer else self.trainer.optimizers
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> Any:
        """The scheduler, a list of them where there are several, or None."""
        found = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward under the run's precision; on return the gradients are averaged over the workers."""
        self.trainer._view.manual_backward(loss, *args, **kwargs)

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Only this optimizer's parameters require gradients until `untoggle_optimizer`."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        state = self.__dict__.setdefault("_toggled", {})
        for other in self.trainer.optimizers:
            for parameter in (p for group in other.param_groups for p in group["params"]):
                state.setdefault(parameter, parameter.requires_grad)
                parameter.requires_grad = state[parameter] and id(parameter) in own

    def untoggle_optimizer(self, optimizer: Any = None) -> None:
        for parameter, requires_grad in self.__dict__.pop("_toggled", {}).items():
            parameter.requires_grad = requires_grad

    @contextmanager
    def toggled_optimizer(self, optimizer: Any) -> Iterator[None]:
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    # ---- metrics

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Tensor], Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Logs a number, a one-element tensor or a torchmetrics metric, without a device sync or a collective.

        The epoch value is `reduce_fx` ("mean", "sum", "min", "max" or a function of a 1-d tensor of all batch values)
        over all batches of all workers, means weighted by `batch_size` (samples; found in the batch where it is not
        given). `sync_dist` is accepted and changes nothing: epoch values are always exact over the workers.
        """
        trainer = self.__dict__.get("_trainer")
        if trainer is None or (rank_zero_only and trainer.global_rank != 0):
            return
        log, metric = trainer._view.log, metric_attribute
        log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx, batch_size, metric)

    def log_dict(self, dictionary: Mapping[str, Any], **arguments: Any) -> None:
        """`log` for each item; takes the arguments of `log`."""
        for name, value in dictionary.items():
            self.log(name, value, **arguments)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on rank 0 alone."""
        if self.global_rank == 0:
            print(*args, **kwargs)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Tensors of all workers stacked along a new first dimension of size world_size; nested containers too. With
        one worker, as in Lightning, no dimension is added.

        Every worker must call it with equal shapes. With `sync_grads` gradients flow back to where they came from.
        """
        return self.trainer.all_gather(data, group, sync_grads) if self._trainer else data

    # ---- hyperparameters, freezing, loading

    def save_hyperparameters(
        self, *names: Any, ignore: str | list[str] | None = None, frame: Any = None, logger: bool = True
    ) -> None:
        """Keeps the arguments of `__init__` in `hparams`, and in checkpoints: all, those named, or the items of one
        dict, Namespace, dataclass or DictConfig, which `load_from_checkpoint` puts together again. Works before
        `super().__init__()` too."""
        arguments = collect_arguments(self, frame or inspect.currentframe().f_back)  # type: ignore[union-attr]
        found, argument = choose_hyperparameters(names, arguments)
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        self.hparams.update({name: value for name, value in found.items() if name not in ignored})
        for name in ignored:
            self.hparams.pop(name, None)
        self.__dict__["_hparams_logged"] = logger
        if argument is not None:
            self.__dict__["_hparams_argument"] = argument

    @property
    def hparams(self) -> AttributeDict:
        return self.__dict__.setdefault("_hparams", AttributeDict())

    def freeze(self) -> Self:
        """No parameter requires a gradient, and the module is in evaluation mode."""
        self.requires_grad_(False)
        return self.eval()

    def unfreeze(self) -> Self:
        self.requires_grad_(True)
        return self.train()

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = "cpu", strict: bool | None = None, **overrides: Any
    ) -> Self:
        """Rebuilds the module from a checkpoint: its saved hyperparameters, `overrides` on top, then its weights.

        `checkpoint_path` is a checkpoint directory (path or URI), a `raylight` Checkpoint, or a Lightning `.ckpt` file.
        Raises CheckpointCorrupt where it is damaged and CheckpointMismatch where keys or shapes do not fit.
        """
        return checkpoint_reader().load_module(cls, checkpoint_path, map_location, strict, overrides)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
