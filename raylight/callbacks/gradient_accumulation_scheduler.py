"""GradientAccumulationScheduler: another accumulation factor from given epochs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylight.callbacks.mistake_list import Mistakes, is_int
from raylight.contract.errors import InvalidArguments
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.contract.config import Config
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


class GradientAccumulationScheduler(Callback):
    """`scheduling` maps an epoch, counted from 0, to the number of batches per optimizer step from then on.

    Before the first epoch named, each batch is a step: `{4: 2}` accumulates two batches from the fifth epoch on.
    """

    def __init__(self, scheduling: dict[int, int]):
        mistakes = Mistakes("GradientAccumulationScheduler")
        if not isinstance(scheduling, dict) or not scheduling:
            mistakes.add(f"scheduling={scheduling!r} must be a dict of epoch to number of batches, such as {{4: 2}}.")
            mistakes.raise_any()
        for epoch, factor in scheduling.items():
            mistakes.require(is_int(epoch) and epoch >= 0, f"epoch {epoch!r} must be an int of at least 0.")
            mistakes.require(is_int(factor) and factor >= 1, f"{factor!r} batches must be an int of at least 1.")
        mistakes.raise_any()
        self.scheduling = {0: 1} | scheduling
        self.epochs = sorted(self.scheduling)

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Batches per optimizer step in `epoch`."""
        return self.scheduling[max(begin for begin in self.epochs if begin <= epoch)]

    def going_to_accumulate_grad_batches(self) -> bool:
        return any(factor > 1 for factor in self.scheduling.values())

    def _find_mistakes(self, config: Config) -> list[str]:
        defaults = {"accumulate_grad_batches": 1, "global_batch_size": None}
        return [
            f"{name}={getattr(config, name)} and GradientAccumulationScheduler both set the accumulation; "
            "keep one of them."
            for name, default in defaults.items()
            if getattr(config, name) != default
        ]

    def on_train_start(self, trainer: TrainerNames, module: Module) -> None:
        if not module.automatic_optimization:
            raise InvalidArguments(
                "GradientAccumulationScheduler: the module optimizes manually (automatic_optimization=False) and so "
                "decides itself when to step; remove the callback."
            )
        # a run that goes on in the middle of an epoch has no start of that epoch
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: TrainerNames, module: Module) -> None:
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
