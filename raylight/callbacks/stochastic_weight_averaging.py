"""StochasticWeightAveraging: the mean of the weights of the last epochs, reached with a learning rate of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR

from raylight.callbacks.averaged_weights import AveragedWeights, AverageOne, AverageView
from raylight.callbacks.mistake_list import Mistakes, is_int, is_number
from raylight.contract.kinds import Value
from raylight.contract.plain_numbers import to_python
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.contract.config import Config
    from raylight.user.module import Module
    from raylight.user.module_hooks import Stepping
    from raylight.user.trainer_names import TrainerNames


UNCALLED = ("update_parameters", "reset_batch_norm_and_save_state", "reset_momenta")
"""Methods of Lightning's callback."""
ANNEALING = ("anneal_epochs", "anneal_func", "_anneal_func", "_anneal_strategy")
"""Entries of SWALR's state that are arguments of the callback."""


class StochasticWeightAveraging(Callback):
    """Averages the weights once an epoch from `swa_epoch_start` on and gives the module the average at the end.

    `swa_epoch_start` counts epochs from 1, or is the fraction of `max_epochs` after which to begin. From then on the
    learning rate goes to `swa_lrs` (one for all parameter groups, or one each) over `annealing_epochs`, by
    `annealing_strategy` "cos" or "linear", and the module's own schedulers rest. The weights are averaged as each of
    these epochs begins, `avg_fn(averaged, current, num_averaged)` or equally weighted, on `device` (None: the
    module's). When training has come to its last epoch or step the module gets the average, and one pass over the
    training data, without gradients, measures the statistics of its batch norm layers again.

    The checkpoints of these epochs hold the weights that are trained, with the average beside them, so that a run goes
    on exactly. Behaves as in Lightning 2.6, for one optimizer; the paper is Izmailov et al., "Averaging Weights Leads
    to Wider Optima and Better Generalization", UAI 2018.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: str = "cos",
        avg_fn: AverageOne | None = None,
        device: torch.device | str | None = "cpu",
    ):
        mistakes = Mistakes("StochasticWeightAveraging")
        rates = swa_lrs if isinstance(swa_lrs, (list, tuple)) else [swa_lrs]
        mistakes.require(
            bool(rates) and all(is_number(rate) and rate > 0 for rate in rates),
            f"swa_lrs={swa_lrs!r} must be a number above 0, or a list with one for each parameter group.",
        )
        is_fraction = isinstance(swa_epoch_start, float) and 0 <= swa_epoch_start <= 1
        mistakes.require(
            is_fraction or (is_int(swa_epoch_start) and swa_epoch_start >= 1),
            f"swa_epoch_start={swa_epoch_start!r} must be an int of at least 1 or a float from 0 to 1.",
        )
        mistakes.require_count("annealing_epochs", annealing_epochs, 0)
        mistakes.require_choice("annealing_strategy", annealing_strategy, ("cos", "linear"))
        mistakes.require(avg_fn is None or callable(avg_fn), f"avg_fn={avg_fn!r} must be a function.")
        mistakes.refuse_overrides(self, UNCALLED, "say avg_fn=, or override on_train_epoch_start or on_train_end")
        mistakes.raise_any()
        own_avg_fn = type(self).avg_fn if type(self).avg_fn is not StochasticWeightAveraging.avg_fn else None
        self.swa_lrs = swa_lrs
        self.swa_epoch_start = to_python(swa_epoch_start)
        self.annealing_epochs = to_python(annealing_epochs)
        self.annealing_strategy = annealing_strategy
        self.average = AveragedWeights(device, use_buffers=False, avg_fn=avg_fn or own_avg_fn)
        self._module: Module | None = None
        self._max_epochs: float = math.inf
        self._begin()

    def _begin(self) -> None:
        self.average.reset()
        self._scheduler: SWALR | None = None
        self._scheduler_state: dict[str, Value] | None = None
        self._latest_update_epoch = -1

    def first_epoch(self, max_epochs: float) -> int:
        """The epoch, counted from 0, at whose start the weights are averaged for the first time."""
        start = self.swa_epoch_start
        return max((start if isinstance(start, int) else int(max_epochs * start)) - 1, 0)

    def _find_mistakes(self, config: Config) -> list[str]:
        start, limit = self.swa_epoch_start, config.max_epochs
        if limit is None or config.fast_dev_run:
            return []
        if limit == -1 and isinstance(start, float):
            return [
                f"StochasticWeightAveraging: swa_epoch_start={start} is a fraction of max_epochs, and there is no "
                "limit of epochs; give the epoch as an int."
            ]
        if limit != -1 and self.first_epoch(limit) >= limit:
            return [f"StochasticWeightAveraging: swa_epoch_start={start} is never reached with max_epochs={limit}."]
        return []

    # ---- hooks

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if stage == "fit":
            self._module = module
            self._begin()

    @staticmethod
    def avg_fn(averaged_model_parameter: Tensor, model_parameter: Tensor, num_averaged: Tensor | int) -> Tensor:
        """The mean of equal weights; a subclass that overrides it averages by its own."""
        return averaged_model_parameter + (model_parameter - averaged_model_parameter) / (num_averaged + 1)

    @property
    def swa_start(self) -> int:
        """`first_epoch` of the run that is on."""
        return self.first_epoch(self._max_epochs)

    @property
    def swa_end(self) -> float:
        """The last epoch of the run that is on, counted from 0; inf without a limit."""
        return self._max_epochs - 1

    @property
    def _average_model(self) -> AverageView | None:
        return None if self._module is None else AverageView(self.average, self._module)

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: nn.Module) -> bool:
        """Whether a layer keeps running statistics."""
        return bool(find_batch_norms(pl_module))

    @staticmethod
    @torch.no_grad()
    def transfer_weights(src_pl_module: nn.Module, dst_pl_module: nn.Module) -> None:
        """Copy the parameters of one module into another's."""
        for source, target in zip(src_pl_module.parameters(), dst_pl_module.parameters(), strict=True):
            target.copy_(source)

    def on_fit_start(self, trainer: TrainerNames, module: Module) -> None:
        limit = trainer.max_epochs
        self._max_epochs = math.inf if limit is None or limit == -1 else limit
        mistakes = Mistakes("StochasticWeightAveraging")
        count = len(trainer.optimizers)
        mistakes.require(count == 1, f"works with one optimizer; configure_optimizers returned {count}.")
        num_groups = len(trainer.optimizers[0].param_groups) if trainer.optimizers else 0
        if isinstance(self.swa_lrs, (list, tuple)) and len(self.swa_lrs) != num_groups:
            mistakes.add(f"swa_lrs has {len(self.swa_lrs)} rates, and the optimizer has {num_groups} parameter groups.")
        mistakes.take(self._find_mistakes(trainer.config))
        if not module.automatic_optimization and find_batch_norms(module):
            mistakes.add(
                "measures batch norm by calling training_step without gradients, which a module that optimizes "
                "manually cannot do."
            )
        mistakes.raise_any()

    def on_train_start(self, trainer: TrainerNames, module: Module) -> None:
        if self.average.is_swapped:  # a peer was lost while batch norm was measured, and the end is yet to come
            self.average.swap(module)
        state, self._scheduler_state = self._scheduler_state, None
        if state is None:
            return
        optimizer = trainer.optimizers[0]
        rates = [group["lr"] for group in optimizer.param_groups]
        self._take_over_schedule(trainer)
        assert self._scheduler is not None
        own = {name: value for name, value in state.items() if name not in ANNEALING}
        self._scheduler.load_state_dict(own)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # a scheduler that is made sets the rate of its first epoch

    def on_train_epoch_start(self, trainer: TrainerNames, module: Module) -> None:
        epoch = trainer.current_epoch
        if epoch < self.swa_start or epoch <= self._latest_update_epoch:
            return
        if self._scheduler is None:
            self._take_over_schedule(trainer)
        else:
            self._scheduler.step()
        self._latest_update_epoch = epoch
        self.average.update(module)

    def on_train_end(self, trainer: TrainerNames, module: Module) -> None:
        limit, last_step = trainer.max_epochs, trainer.max_steps
        ended = limit is None or limit == -1 or trainer.current_epoch >= limit or trainer.global_step >= last_step > 0
        if not ended or trainer.interrupted or not self.average.num_averaged:
            return
        self.average.swap(module)
        if find_batch_norms(module):
            measure_batch_norms(trainer, module)

    def teardown(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        self._module = None
        self._begin()

    # ---- state

    def state_dict(self) -> dict[str, Value]:
        return {
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            **self.average.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Value]) -> None:
        assert self._module is not None, "a state is loaded after setup"
        self._latest_update_epoch = state_dict["latest_update_epoch"]
        self._scheduler_state = state_dict["scheduler"]
        self.average.load_state_dict(state_dict, self._module)

    # ---- the learning rate

    def _take_over_schedule(self, trainer: TrainerNames) -> None:
        optimizer = trainer.optimizers[0]
        lrs = self.swa_lrs
        rates = list(lrs) if isinstance(lrs, (list, tuple)) else [lrs] * len(optimizer.param_groups)
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, RestingScheduler):
                continue
            if trainer.is_global_zero:
                name = type(config.scheduler).__name__
                trainer.notice(f"StochasticWeightAveraging sets the learning rate from here on; {name} rests.")
            config.scheduler = RestingScheduler(config.scheduler, optimizer)
        self._scheduler = SWALR(optimizer, rates, self.annealing_epochs, self.annealing_strategy)  # type: ignore[arg-type]


class RestingScheduler:
    """Stands for a scheduler that no longer steps; its state goes on being saved and loaded."""

    def __init__(self, scheduler: Stepping, optimizer: Optimizer):
        self.scheduler = scheduler
        self.optimizer = optimizer

    def step(self, *_: object, **__: object) -> None: ...

    def state_dict(self) -> dict[str, Value]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Value]) -> None:
        self.scheduler.load_state_dict(state)

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


def find_batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def measure_batch_norms(trainer: TrainerNames, module: Module) -> None:
    """Statistics of the present weights: the mean over all batches of the training data, of all ranks."""
    layers = find_batch_norms(module)
    momenta = [layer.momentum for layer in layers]
    modes = {inner: inner.training for inner in module.modules()}
    try:
        module.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch: the plain mean over batches, instead of one that forgets
        trainer.forward_training_epoch(skip_uneven=any(isinstance(m, nn.SyncBatchNorm) for m in layers))
        if trainer.world_size > 1:
            _merge(trainer, layers)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for inner, training in modes.items():
            inner.training = training


def _merge(trainer: TrainerNames, layers: list[_BatchNorm]) -> None:
    """The mean over all batches from the means of each rank's own, in one collective."""
    values: list[Tensor] = [value for layer in layers for value in (layer.running_mean, layer.running_var)]  # type: ignore[misc]
    count = layers[0].num_batches_tracked
    assert count is not None
    flat = torch.cat([count.double().reshape(1), *(value.double().reshape(-1) for value in values)])
    shares = trainer.all_gather(flat).view(trainer.world_size, -1)
    counts = shares[:, :1]
    mean = (shares[:, 1:] * counts).sum(0) / counts.sum().clamp(min=1)
    for value, piece in zip(values, mean.split([value.numel() for value in values]), strict=True):
        value.copy_(piece.view_as(value))
