"""EarlyStopping: ends training when a metric has stopped getting better."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING

import torch

from raylight.callbacks.mistake_list import Mistakes, sort_by_nearness
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.contract.plain_numbers import to_python
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


class EarlyStoppingReason(Enum):
    """Why training was stopped; the values are Lightning's."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Stops training when `monitor` has not improved by more than `min_delta` in `patience` checks.

    A check is made at the end of each training epoch if validation runs once an epoch or not at all, else after
    each validation; `check_on_train_epoch_end` decides otherwise. `mode` is "min" or "max". Training also stops when
    the metric is NaN or infinite (`check_finite`), is better than `stopping_threshold`, or worse than
    `divergence_threshold`. A metric that was never logged is an error, with `strict=False` a check that is skipped.
    The metric is the same on all ranks, so each rank decides alone; `log_rank_zero_only` is accepted, and only rank 0
    ever prints. Afterwards `stopped_epoch`, `stopping_reason`, `stopping_reason_message`, `best_score` and
    `wait_count` say what happened. Arguments and defaults are those of Lightning 2.6.
    """

    _judges_values = True

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ):
        mistakes = Mistakes("EarlyStopping")
        mistakes.require(isinstance(monitor, str) and bool(monitor), f"monitor={monitor!r} must name a logged metric.")
        mistakes.require_number("min_delta", min_delta)
        mistakes.require_count("patience", patience, 0)
        mistakes.require_choice("mode", mode, ("min", "max"))
        for name, value in (("stopping_threshold", stopping_threshold), ("divergence_threshold", divergence_threshold)):
            if value is not None:
                mistakes.require_number(name, value)
        mistakes.raise_any()

        self.monitor = monitor
        self.min_delta = to_python(min_delta)
        self.patience = to_python(patience)
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = to_python(stopping_threshold)
        self.divergence_threshold = to_python(divergence_threshold)
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.log_rank_zero_only = log_rank_zero_only
        self._begin()

    def _begin(self) -> None:
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self.best_score = torch.tensor(math.inf if self.mode == "min" else -math.inf)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def state_dict(self) -> dict[str, Value]:
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Value]) -> None:
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = torch.as_tensor(state_dict["best_score"]).cpu()
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", EarlyStoppingReason.NOT_STOPPED))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if stage == "fit":
            self._begin()

    def on_train_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        if self._checks_at_epoch_end(trainer):
            self._check(trainer)

    def on_validation_end(self, trainer: TrainerNames, module: Module) -> None:
        if trainer.fitting and not trainer.sanity_checking and not self._checks_at_epoch_end(trainer):
            self._check(trainer)

    def _checks_at_epoch_end(self, trainer: TrainerNames) -> bool:
        if self.check_on_train_epoch_end is not None:
            return self.check_on_train_epoch_end
        once_an_epoch = trainer.config.val_check_interval == 1.0 and trainer.config.check_val_every_n_epoch == 1
        validates = any(count > 0 for count in trainer.num_val_batches)
        return once_an_epoch or not validates

    def _check(self, trainer: TrainerNames) -> None:
        if trainer.config.fast_dev_run:
            return
        value = self._read(trainer)
        if value is None:
            return
        previous = self.best_score
        self.stopping_reason_message = self._judge(value)
        if self.stopping_reason_message is not None:
            self.stopped_epoch = trainer.current_epoch
            trainer.should_stop = True
            self._tell(trainer, f"EarlyStopping stops training: {self.stopping_reason_message}")
        elif self.verbose and self.best_score is not previous:
            self._tell(trainer, f"EarlyStopping: {self.monitor} improved from {previous:.4g} to {self.best_score:.4g}.")

    def _read(self, trainer: TrainerNames) -> torch.Tensor | None:
        metrics = trainer.callback_metrics
        if self.monitor in metrics:
            value = torch.as_tensor(metrics[self.monitor]).detach().squeeze().cpu()
            # within an epoch a value that was logged per step is each rank's own
            return value if self._checks_at_epoch_end(trainer) else trainer.broadcast(value)
        logged = ", ".join(sort_by_nearness(self.monitor, metrics)) or "nothing"
        text = (
            f"EarlyStopping: monitor={self.monitor!r} was not logged by the end of epoch {trainer.current_epoch}. "
            f"Logged so far: {logged}. Log it with self.log({self.monitor!r}, ...), name one of these, "
            "or pass strict=False to skip the check."
        )
        if self.strict:
            raise InvalidArguments(text)
        if self.verbose:
            self._tell(trainer, text, "warning")
        return None

    def _judge(self, value: torch.Tensor) -> str | None:
        """Take note of a new value of the metric; the reason to stop, or None to go on."""
        if self.check_finite and not torch.isfinite(value):
            self.stopping_reason = EarlyStoppingReason.NON_FINITE_METRIC
            return f"{self.monitor} = {value:.4g} is not finite; the best so far was {self.best_score:.4g}."
        if self.stopping_threshold is not None and self._is_better(value, self.stopping_threshold):
            self.stopping_reason = EarlyStoppingReason.STOPPING_THRESHOLD
            return f"{self.monitor} = {value:.4g} reached stopping_threshold={self.stopping_threshold}."
        if self.divergence_threshold is not None and self._is_better(self.divergence_threshold, value):
            self.stopping_reason = EarlyStoppingReason.DIVERGENCE_THRESHOLD
            return f"{self.monitor} = {value:.4g} is worse than divergence_threshold={self.divergence_threshold}."
        margin = self.min_delta if self.mode == "min" else -self.min_delta
        if self._is_better(value + margin, self.best_score):
            self.best_score = value
            self.wait_count = 0
            return None
        self.wait_count += 1
        if self.wait_count < self.patience:
            return None
        self.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
        return (
            f"{self.monitor} did not improve in the last {self.wait_count} checks; the best was {self.best_score:.4g}."
        )

    def _is_better(self, value: torch.Tensor | float, than: torch.Tensor | float) -> bool:
        return bool(value < than) if self.mode == "min" else bool(value > than)

    @staticmethod
    def _tell(trainer: TrainerNames, text: str, level: str = "info") -> None:
        if trainer.is_global_zero:
            trainer.notice(text, level)
