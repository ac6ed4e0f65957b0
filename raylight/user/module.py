"""Module: what the user subclasses. Its hooks carry Lightning's names, meanings and order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from raylight.contract.config import FilePath
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Batch, Value
from raylight.user.checkpoint_reader import CheckpointPath, MapLocation, checkpoint_reader
from raylight.user.export import OnnxTarget, to_onnx, to_torchscript
from raylight.user.hyperparameters import AttributeDict, HyperparametersMixin
from raylight.user.module_hooks import ModuleHooks, Stepping
from raylight.user.trainer_names import TrainerNames

_READERS = ("torch.jit._recursive", "torch._jit_internal")
"""Where torch.jit reads every attribute of a module, those that work in a run alone among them."""


class Module(HyperparametersMixin, ModuleHooks):
    """A torch module that knows how to train itself.

    `training_step` and `configure_optimizers` are required to `fit`; every other hook is optional, and one that is
    not overridden costs nothing. A step takes `(batch)`, `(batch, batch_idx)` or `(batch, batch_idx,
    dataloader_idx)`. `training_step` returns the loss, a scalar tensor with a gradient, or a dict with it as "loss".
    """

    automatic_optimization: bool = True
    """False: training_step steps the optimizers itself, through `optimizers()` and `manual_backward`."""
    strict_loading: bool = True
    """Whether a checkpoint must hold exactly the keys of this module's state."""
    example_input_array: Batch = None
    """Input of `forward`, from which ModelSummary finds shapes: a tensor, a tuple of arguments or a dict of them."""
    device_mesh: None = None
    """Lightning's mesh of devices, for models that are divided over several; here each worker has the whole one."""
    fabric: None = None
    """Lightning's Fabric, which raylight does not have."""
    _trainer: TrainerNames | None
    __jit_unused_properties__: ClassVar[list[str]]
    __jit_ignored_attributes__: ClassVar[list[str]]

    def __init__(self, *args: Value, **kwargs: Value) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["_trainer"] = None
        self.__dict__.setdefault("_hparams", AttributeDict())

    # ---- where it runs

    @property
    def trainer(self) -> TrainerNames:
        """The trainer that runs this module: in this process the caller's own, on a worker one of the same class."""
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            if sys._getframe(1).f_globals.get("__name__") in _READERS:
                return None  # type: ignore[return-value]
            raise RuntimeError(
                f"{type(self).__name__} is not attached to a run: `trainer` exists inside the hooks only."
            )
        return trainer

    @trainer.setter
    def trainer(self, trainer: TrainerNames | None) -> None:
        self.__dict__["_trainer"] = trainer

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer; the CPU if there is none."""
        return next((tensor.device for tensor in _tensors(self)), torch.device("cpu"))

    @property
    def on_gpu(self) -> bool:
        """Whether the module is on a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter or buffer, else torch's default."""
        floating = (tensor.dtype for tensor in _tensors(self) if tensor.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def current_epoch(self) -> int:
        """Finished epochs of training, which is the number of the present one, from 0."""
        return self._trainer.current_epoch if self._trainer else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps made so far; 0 outside a run."""
        return self._trainer.global_step if self._trainer else 0

    @property
    def global_rank(self) -> int:
        """This worker among all, from 0."""
        return self._trainer.global_rank if self._trainer else 0

    @property
    def local_rank(self) -> int:
        """This worker among those of its node, from 0."""
        return self._trainer.local_rank if self._trainer else 0

    @property
    def logger(self) -> Value:
        """The first of the loggers; None if there is none."""
        return self._trainer.logger if self._trainer else None

    @property
    def loggers(self) -> list[Value]:
        """The run's loggers."""
        return self._trainer.loggers if self._trainer else []

    def __getstate__(self) -> dict[str, Value]:
        return {**self.__dict__, "_trainer": None}

    # ---- manual optimization

    def optimizers(self, use_pl_optimizer: bool = True) -> Stepping:
        """The optimizer, or the list of them if there are several."""
        found = self.trainer.stepping_optimizers if use_pl_optimizer else self.trainer.optimizers
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> Stepping:
        """The scheduler, a list of them if there are several, or None."""
        found = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: Tensor, *args: Value, **kwargs: Value) -> None:
        """Compute gradients under the run's precision; on return they are averaged over the workers."""
        self.trainer._view.manual_backward(loss, *args, **kwargs)

    def toggle_optimizer(self, optimizer: Stepping) -> None:
        """Let only this optimizer's parameters require gradients until `untoggle_optimizer`."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        state = self.__dict__.setdefault("_toggled", {})
        for other in self.trainer.optimizers:
            for parameter in (p for group in other.param_groups for p in group["params"]):
                state.setdefault(parameter, parameter.requires_grad)
                parameter.requires_grad = state[parameter] and id(parameter) in own

    def untoggle_optimizer(self, optimizer: Stepping = None) -> None:
        """Let parameters require gradients as they did before `toggle_optimizer`."""
        for parameter, requires_grad in self.__dict__.pop("_toggled", {}).items():
            parameter.requires_grad = requires_grad

    @contextmanager
    def toggled_optimizer(self, optimizer: Stepping) -> Iterator[None]:
        """`toggle_optimizer` and `untoggle_optimizer` around a `with` block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    # ---- metrics

    def log(
        self,
        name: str,
        value: Value,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Tensor], Value] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: object = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a number, a one-element tensor or a torchmetrics metric, without a device sync or a collective.

        The epoch value is `reduce_fx` ("mean", "sum", "min", "max" or a function of a 1-d tensor of all batch values)
        over all batches of all workers, means weighted by `batch_size` (samples; found in the batch if it is not
        given). `sync_dist` is accepted and changes nothing: epoch values are always exact over the workers.
        """
        trainer = self.__dict__.get("_trainer")
        if trainer is None or (rank_zero_only and trainer.global_rank != 0):
            return
        log, metric = trainer._view.log, metric_attribute
        log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx, batch_size, metric)

    def log_dict(self, dictionary: Mapping[str, Value], **arguments: Value) -> None:
        """Log each item; takes the arguments of `log`."""
        for name, value in dictionary.items():
            self.log(name, value, **arguments)

    def print(self, *args: object, **kwargs: Value) -> None:
        """Print on rank 0 alone."""
        if self.global_rank == 0:
            print(*args, **kwargs)

    def all_gather(self, data: Value, group: object = None, sync_grads: bool = False) -> Value:
        """Stack tensors of all workers along a new first dimension of size world_size; nested containers too. With
        one worker, as in Lightning, no dimension is added.

        Every worker must call it with equal shapes. With `sync_grads` gradients flow back to where they came from.
        """
        return self.trainer.all_gather(data, group, sync_grads) if self._trainer else data

    # ---- freezing, loading

    def freeze(self) -> Self:
        """Let no parameter require a gradient, and switch to evaluation mode."""
        self.requires_grad_(False)
        return self.eval()

    def unfreeze(self) -> Self:
        """Let all parameters require gradients, and switch to training mode."""
        self.requires_grad_(True)
        return self.train()

    def to_torchscript(
        self,
        file_path: FilePath | None = None,
        method: str = "script",
        example_inputs: Batch = None,
        **kwargs: Value,
    ) -> torch.jit.ScriptModule:
        """Return the module as TorchScript in evaluation mode, and write it to `file_path` if there is one.

        `method` is "script", or "trace", which follows one call with `example_inputs` or `example_input_array`. The
        other arguments go to `torch.jit.script` or `torch.jit.trace`. Override it to script a part alone.
        """
        return to_torchscript(self, file_path, method, example_inputs, kwargs)

    def to_onnx(self, file_path: OnnxTarget | None = None, input_sample: Batch = None, **kwargs: Value) -> Value:
        """Write the module in the ONNX format, by one call with `input_sample` or `example_input_array`.

        The other arguments go to `torch.onnx.export`, whose result is returned. Needs the extra `raylight[onnx]`.
        """
        return to_onnx(self, file_path, input_sample, kwargs)

    def to_tensorrt(self, *args: Value, **kwargs: Value) -> None:
        """Raise InvalidArguments: TensorRT reads what `to_onnx` writes."""
        raise InvalidArguments("to_tensorrt is not in raylight: write the file that TensorRT reads by to_onnx(...)")

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: CheckpointPath,
        map_location: MapLocation = None,
        hparams_file: FilePath | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **overrides: Value,
    ) -> Self:
        """Rebuild the module from a checkpoint: its saved hyperparameters, `overrides` on top, then its weights.

        `checkpoint_path` is a checkpoint directory or a file in Lightning's format, by path or URI; such a file, opened
        for reading bytes; or a Checkpoint, raylight's or Ray Tune's. `hparams_file`, a .yaml or .csv, takes the place
        of the saved hyperparameters. No code from the checkpoint is run unless `weights_only` is False. Raises
        CheckpointCorrupt if it is damaged and CheckpointMismatch if keys or shapes do not fit.
        """
        return checkpoint_reader().load_module(
            cls, checkpoint_path, map_location, hparams_file, strict, weights_only, overrides
        )


# torch.jit.script would compile these too.
_OWN = [name for name in dir(Module) if isinstance(getattr(Module, name), property)]
Module.__jit_unused_properties__ = _OWN
Module.__jit_ignored_attributes__ = [*_OWN, *Module.__annotations__, *HyperparametersMixin.__annotations__]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
