"""LearningRateFinder: finds a learning rate before training, and trains with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylight.contract.errors import InvalidArguments
from raylight.contract.task import Loaders
from raylight.tuner.attribute_holders import has_attribute, set_attribute
from raylight.tuner.learning_rates import LRFinder, Mode, OptimizerAlone, RangeTest, list_rates
from raylight.tuner.rehearsal import Rehearsal, Rehearsing, as_rehearsing
from raylight.user.callback import Callback
from raylight.user.module import Module

if TYPE_CHECKING:
    from raylight.user.trainer_names import TrainerNames

NAMES = ("lr", "learning_rate")
MODES = ("exponential", "linear")


class LearningRateFinder(Callback):
    """Trains `num_training_steps` steps at learning rates from `min_lr` to `max_lr` on copies, takes everything back,
    and trains with the rate at which the loss fell most steeply.

    `mode` is "exponential" or "linear". The test ends early where the loss is `early_stop_threshold` times the best;
    None: never. With `update_attr` the module's attribute or hyperparameter `attr_name` ("lr" or "learning_rate" if it
    is empty) is set. `optimal_lr` is the result, with `suggestion()`, `results` and `plot()`.

    It works before the first step, on any number of workers. A hook of a subclass may call `lr_find` in the middle of
    training in one process (`num_workers=0`); the test there has an optimizer of its own.
    """

    SUPPORTED_MODES = MODES

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: Mode = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        mistakes = []
        if str(mode).lower() not in MODES:
            mistakes.append(f"LearningRateFinder: mode={mode!r}; allowed are {MODES}")
        if not 0 < min_lr < max_lr:
            mistakes.append(f"LearningRateFinder: min_lr={min_lr} must be above 0 and below max_lr={max_lr}")
        if num_training_steps < 1:
            mistakes.append(f"LearningRateFinder: num_training_steps={num_training_steps} must be at least 1")
        if mistakes:
            raise InvalidArguments(mistakes)
        self._min_lr, self._max_lr, self._num_training_steps = min_lr, max_lr, num_training_steps
        self._mode: Mode = "linear" if str(mode).lower() == "linear" else "exponential"
        self._early_stop_threshold, self._update_attr, self._attr_name = early_stop_threshold, update_attr, attr_name
        self.optimal_lr: LRFinder | None = None

    def prepare_run(self, trainer: Rehearsing, stage: str, module: Module, loaders: Loaders) -> None:
        """Called in the caller's process before a run, while no worker has begun."""
        if stage == "fit" and type(self).on_fit_start is LearningRateFinder.on_fit_start:
            self.search(trainer, module, loaders)

    def search(self, trainer: Rehearsing, module: Module, loaders: Loaders) -> None:
        """Finds the learning rate of `module`, and sets it there."""
        name = self._find_attribute(module) if self._update_attr else ""
        found = LRFinder(self._mode, self._min_lr, self._max_lr, self._num_training_steps)
        rates = list_rates(self._mode, self._min_lr, self._max_lr, self._num_training_steps)
        test, rehearsal = RangeTest(rates, self._early_stop_threshold), Rehearsal(trainer, "fit", module, loaders)
        copied, data_module = rehearsal.copy()
        vars(copied)["configure_optimizers"] = OptimizerAlone(copied, rates[0])
        changes = {"max_steps": len(rates), "max_epochs": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        rehearsal.run(copied, data_module, [test], changes)
        found.note(rates[: len(test.losses)], test.losses)
        self.optimal_lr, rate = found, found.suggestion()
        if name and rate is not None:
            set_attribute(name, rate, module)

    def _find_attribute(self, module: Module) -> str:
        names = (self._attr_name,) if self._attr_name else NAMES
        for name in names:
            if has_attribute(name, module):
                return name
        raise InvalidArguments(
            f"lr_find sets the learning rate, and {type(module).__name__} has no {' or '.join(names)}, nor have its "
            "hparams: name it with attr_name=..., or pass update_attr=False"
        )

    def lr_find(self, trainer: TrainerNames, pl_module: Module) -> None:
        """Finds the learning rate inside a hook, in one process, and goes on with it."""
        if trainer.world_size > 1:
            raise InvalidArguments(
                f"{type(self).__name__}: with {trainer.world_size} workers lr_find cannot be called in a hook: call "
                "Tuner(trainer).lr_find(...) before fit"
            )
        given = Loaders(train=trainer.train_dataloader, data_module=trainer.datamodule)
        self.search(as_rehearsing(trainer), pl_module, given)
        self._set_rates(trainer)

    def on_fit_start(self, trainer: TrainerNames, module: Module) -> None:
        self._set_rates(trainer)

    def _set_rates(self, trainer: TrainerNames) -> None:
        rate = self.optimal_lr.suggestion() if self.optimal_lr is not None and self._update_attr else None
        if rate is not None:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
