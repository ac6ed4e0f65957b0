"""Learning rates of a range test: which are tried, what each led to, and the one to take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Output, Value
from raylight.user.callback import Callback
from raylight.user.module import Module
from raylight.user.transfer import batch_size_of
from raylight.worker.step.optimizers import make_optimizers

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from raylight.user.trainer_names import TrainerNames

Mode: TypeAlias = Literal["exponential", "linear"]
SMOOTHING = 0.98


def list_rates(mode: Mode, lr_min: float, lr_max: float, num_training: int) -> list[float]:
    """The learning rate of each step, the same numbers as Lightning's."""
    rates = [lr_min]
    for step in range(1, num_training):
        share = (step + 1) / num_training
        if mode == "linear":
            rates.append(lr_min + share * (lr_max - lr_min))
        else:
            rates.append(lr_min * (lr_max / lr_min) ** share)
    return rates


class LRFinder:
    """What `lr_find` has found: `results` has the learning rates under "lr" and the smoothed losses under "loss"."""

    def __init__(self, mode: Mode, lr_min: float, lr_max: float, num_training: int):
        self.mode, self.lr_min, self.lr_max, self.num_training = mode, lr_min, lr_max, num_training
        self.results: dict[str, list[float]] = {"lr": [], "loss": []}

    def note(self, rates: list[float], losses: list[float]) -> None:
        """The results of the range test."""
        self.results = {"lr": rates, "loss": losses}

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The learning rate at which the loss falls most steeply, without the first and last points; None if fewer
        than two finite ones are left."""
        index = self._find_steepest(skip_begin, skip_end)
        return None if index is None else self.results["lr"][index]

    def _find_steepest(self, skip_begin: int, skip_end: int) -> int | None:
        losses = self.results["loss"]
        kept = [i for i in range(len(losses))[skip_begin:-skip_end] if math.isfinite(losses[i])]
        if len(kept) < 2:
            return None
        slopes = torch.gradient(
            torch.tensor([losses[i] for i in kept]), spacing=[torch.tensor([self.results["lr"][i] for i in kept])]
        )
        return kept[int(slopes[0].argmin())]

    def plot(self, suggest: bool = False, show: bool = False, ax: Value = None) -> Value:
        """Draws the losses over the learning rates with matplotlib, and returns the figure. `suggest` marks the
        suggestion, `show` opens a window, `ax` are axes to draw on."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("a plot needs the package matplotlib: pip install 'raylight[plot]'") from error

        if ax is None:
            _, ax = pyplot.subplots()
        rates, losses = self.results["lr"], self.results["loss"]
        ax.plot(rates, losses)
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Loss")
        index = self._find_steepest(10, 1) if suggest else None
        if index is not None:
            ax.plot(rates[index], losses[index], marker="o", markersize=10, color="red")
        if show:
            pyplot.show()
        return ax.figure


class RangeTest(Callback):
    """Trains each step at its learning rate and keeps the smoothed loss, which is over the samples of all ranks; stops
    where it has grown to `threshold` times the best one."""

    def __init__(self, rates: list[float], threshold: float | None):
        self.rates, self.threshold = rates, threshold
        self.losses: list[float] = []
        self._average = self._best = 0.0
        self._num_steps = 0
        self._waiting: tuple[float, int] | None = None

    def on_before_optimizer_step(self, trainer: TrainerNames, module: Module, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.rates[min(trainer.global_step, len(self.rates) - 1)]

    def on_train_batch_end(
        self, trainer: TrainerNames, module: Module, outputs: Output, batch: Value, batch_idx: int
    ) -> None:
        if trainer.global_step == self._num_steps:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:  # the point has none; with several ranks each must return one
            self._num_steps = trainer.global_step
            self.losses.append(float("nan"))
            return
        one = (float(loss), batch_size_of(batch) or 1)
        if trainer.is_last_batch:
            self._waiting = one  # another rank may have no sample of it, and does not come here
        else:
            self._take(trainer, one)

    def on_train_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        if trainer.global_step != self._num_steps:
            self._take(trainer, self._waiting or (0.0, 0))
        self._waiting = None

    def _take(self, trainer: TrainerNames, own: tuple[float, int]) -> None:
        loss, count = own
        if trainer.world_size > 1:
            total = trainer.reduce(torch.tensor([loss * count, count], dtype=torch.float64), reduce_op="sum")
            loss = float(total[0] / total[1])
        self._num_steps = number = trainer.global_step
        self._average = SMOOTHING * self._average + (1 - SMOOTHING) * loss
        smoothed = self._average / (1 - SMOOTHING ** (number + 1))
        if self.threshold is not None and number > 1 and smoothed > self.threshold * self._best:
            trainer.should_stop = True
        if smoothed < self._best or number == 1:
            self._best = smoothed
        self.losses.append(smoothed)


class OptimizerAlone:
    """A module's `configure_optimizers` without its schedulers, beginning at a learning rate."""

    def __init__(self, module: Module, rate: float):
        self.module, self.rate = module, rate
        self.own = vars(module).get("configure_optimizers")

    def __call__(self) -> Value:
        returned = self.own() if self.own is not None else type(self.module).configure_optimizers(self.module)
        optimizers, _ = make_optimizers(returned, self.module.automatic_optimization)
        if len(optimizers) != 1:
            raise InvalidArguments(
                f"lr_find works with one optimizer, and configure_optimizers returned {len(optimizers)}"
            )
        for group in optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] = self.rate
        return optimizers[0]
