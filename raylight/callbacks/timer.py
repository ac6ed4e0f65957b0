"""Timer: how long the stages of a run took, and an end to training after a given time."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from raylight.callbacks.mistake_list import Mistakes
from raylight.contract.durations import Duration
from raylight.contract.kinds import Batch, Output, Value
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames

STAGES = ("train", "validate", "test", "predict")
CHECK_EVERY_S = 1.0  # more than one worker: how often they agree on the time, at the cost of one small broadcast


class Timer(Callback):
    """Measures the stages in seconds and stops training after `duration`.

    `duration` is "DD:HH:MM:SS", a `timedelta`, the keyword arguments of one as a dict, or None to only measure.
    `interval` is "step" or "epoch": training may end after each. Rank 0's clock decides for all; with several workers
    and manual optimization it is read at the end of epochs alone. A run that continues from a checkpoint keeps the time
    that it had used up there. Arguments are those of Lightning 2.6.
    """

    def __init__(
        self,
        duration: Duration | None = None,
        interval: str = "step",
        verbose: bool = True,
    ):
        mistakes = Mistakes("Timer")
        mistakes.require_choice("interval", interval, ("step", "epoch"))
        read = mistakes.read_duration("duration", duration)
        self._duration_s = read.total_seconds() if read is not None else None
        mistakes.raise_any()
        self._interval = interval
        self._verbose = verbose
        self._started: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._offset_s = 0.0  # what training took before the checkpoint that it goes on from
        self._last_check = (-1, 0.0)  # step and seconds, by this rank's own clock
        # equal on all ranks, as a check is a collective
        self._agreed_s = 0.0
        self._check_at_step = 0

    def start_time(self, stage: str = "train") -> float | None:
        """When the stage last began, by the clock `time.monotonic` of rank 0's machine; None if it did not."""
        return self._started.get(_known(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """When the stage last ended, by the same clock; None if it did not."""
        return self._ended.get(_known(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds of the stage so far; for "train" with those before the checkpoint that the run went on from."""
        begin, end = self.start_time(stage), self.end_time(stage)
        offset = self._offset_s if stage == "train" else 0.0
        if begin is None:
            return offset
        return (time.monotonic() if end is None or end < begin else end) - begin + offset

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds left of `duration`; None without one."""
        return None if self._duration_s is None else self._duration_s - self.time_elapsed(stage)

    def state_dict(self) -> dict[str, Value]:
        return {
            "time_elapsed": {stage: self.time_elapsed(stage) for stage in STAGES},
            "agreed_s": self._agreed_s,
        }

    def load_state_dict(self, state_dict: dict[str, Value]) -> None:
        self._offset_s = state_dict["time_elapsed"]["train"]
        self._agreed_s = state_dict.get("agreed_s", self._offset_s)  # Lightning has none
        if "train" in self._started:
            self._started["train"] = time.monotonic()

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if stage == "fit":
            self._started.pop("train", None)
            self._ended.pop("train", None)
            self._offset_s = self._agreed_s = 0.0

    def on_train_start(self, trainer: TrainerNames, module: Module) -> None:
        # training also starts again when a lost worker was replaced: then it began before, and all ranks check
        self._started.setdefault("train", time.monotonic())
        self._check_at_step = 0
        if self._duration_s is not None and self._agreed_s >= self._duration_s:
            self._stop(trainer)

    def on_train_end(self, trainer: TrainerNames, module: Module) -> None:
        self._ended["train"] = time.monotonic()

    def on_validation_start(self, trainer: TrainerNames, module: Module) -> None:
        self._started["validate"] = time.monotonic()

    def on_validation_end(self, trainer: TrainerNames, module: Module) -> None:
        self._ended["validate"] = time.monotonic()

    def on_test_start(self, trainer: TrainerNames, module: Module) -> None:
        self._started["test"] = time.monotonic()

    def on_test_end(self, trainer: TrainerNames, module: Module) -> None:
        self._ended["test"] = time.monotonic()

    def on_predict_start(self, trainer: TrainerNames, module: Module) -> None:
        self._started["predict"] = time.monotonic()

    def on_predict_end(self, trainer: TrainerNames, module: Module) -> None:
        self._ended["predict"] = time.monotonic()

    def on_before_zero_grad(self, trainer: TrainerNames, module: Module, optimizer: Optimizer) -> None:
        # every rank begins every step, while one that has no samples in an epoch's last batch does not come to its end
        if trainer.world_size > 1:
            self._check_in_step(trainer)

    def on_train_batch_end(
        self, trainer: TrainerNames, module: Module, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.world_size == 1:
            self._check_in_step(trainer)

    def on_train_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        self._check(trainer)

    def _check_in_step(self, trainer: TrainerNames) -> None:
        if self._interval == "step" and trainer.global_step >= self._check_at_step:
            self._check(trainer)

    def _check(self, trainer: TrainerNames) -> None:
        if self._duration_s is None:
            return
        elapsed_s = self.time_elapsed()
        self._agreed_s, num_steps = trainer.broadcast((elapsed_s, self._steps_to_next_check(trainer, elapsed_s)))
        self._check_at_step = trainer.global_step + num_steps
        if self._agreed_s >= self._duration_s:
            self._stop(trainer)

    def _stop(self, trainer: TrainerNames) -> None:
        trainer.should_stop = True
        if self._verbose and trainer.is_global_zero:
            trainer.notice(f"Timer stops training after {timedelta(seconds=int(self._agreed_s))}, as asked for.")

    def _steps_to_next_check(self, trainer: TrainerNames, elapsed_s: float) -> int:
        """Half the steps that the time left is good for, at most a second's worth; 1 if nothing is shared, or not
        known yet."""
        (step, then_s), self._last_check = self._last_check, (trainer.global_step, elapsed_s)
        num_steps, passed_s = trainer.global_step - step, elapsed_s - then_s
        if trainer.world_size == 1 or self._duration_s is None or step < 0 or num_steps <= 0 or passed_s <= 0:
            return 1
        return max(1, int(min((self._duration_s - elapsed_s) / 2, CHECK_EVERY_S) / (passed_s / num_steps)))


def _known(stage: str) -> str:
    mistakes = Mistakes("Timer")
    mistakes.require_choice("stage", stage, STAGES)
    mistakes.raise_any()
    return stage
