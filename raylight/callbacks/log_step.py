"""When a callback that logs by itself may do so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raylight.user.trainer_names import TrainerNames


def find_log_step(trainer: TrainerNames, first: int, last: int) -> int | None:
    """The newest of the steps from `first` to `last` that is one of every `log_every_n_steps`."""
    every = trainer.config.log_every_n_steps
    step = last - last % every if every > 0 else 0
    return step if step >= first else None


def is_log_step(trainer: TrainerNames, count: int) -> bool:
    """Whether the `count`-th step (or batch of an evaluation), counted from 1, is one of every `log_every_n_steps`."""
    every = trainer.config.log_every_n_steps
    return every > 0 and count > 0 and count % every == 0
