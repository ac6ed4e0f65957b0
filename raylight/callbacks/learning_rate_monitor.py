"""LearningRateMonitor: learning rates in the log, to see what the schedulers do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from raylight.callbacks.log_step import find_log_step
from raylight.callbacks.mistake_list import Mistakes
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Batch, Value
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from raylight.contract.config import Config
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


class LearningRateMonitor(Callback):
    """Logs the learning rate of each parameter group, with momentum (or the first beta) and weight decay on request.

    `logging_interval` is "step" (every `log_every_n_steps`), "epoch" (at its start) or None: as each scheduler steps;
    an optimizer without a scheduler at both. A value
    logged for a step is the one that the step is made with. All of them are in `trainer.callback_metrics` too, so that
    EarlyStopping can watch one. Names are those of Lightning 2.6: "lr-Adam", "lr-Adam-1"
    for a second Adam, "lr-Adam/pg1" for a group, or the `name` that the scheduler or the group was given. `lrs` keeps
    what was logged, by name; `log_key_prefix` stands in front of the names in the log alone.
    """

    def __init__(
        self,
        logging_interval: str | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
        log_key_prefix: str = "",
    ):
        mistakes = Mistakes("LearningRateMonitor")
        mistakes.require(isinstance(log_key_prefix, str), f"log_key_prefix={log_key_prefix!r} must be a string.")
        mistakes.require_choice("logging_interval", logging_interval, (None, "step", "epoch"))
        mistakes.raise_any()
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.log_key_prefix = log_key_prefix
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}
        self._logged_step = 0
        self._last_step: int | None = None  # done before the batch before
        self._steps_a_batch = 1

    def _find_mistakes(self, config: Config) -> list[str]:
        if config.logger is not False or config.fast_dev_run:
            return []
        return ["LearningRateMonitor has nowhere to log to with logger=False; remove one of them."]

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if stage == "fit":
            self._logged_step, self._last_step, self._steps_a_batch = 0, None, 1
            self.lrs, self.last_momentum_values, self.last_weight_decay_values = {}, {}, {}

    def on_train_start(self, trainer: TrainerNames, module: Module) -> None:
        found = list(_name_groups(trainer))
        for name in (name for _, _, names in found for name in names):
            self.lrs.setdefault(name, [])
            self.last_momentum_values.setdefault(f"{name}-momentum", None)
            self.last_weight_decay_values.setdefault(f"{name}-weight_decay", None)
        without = sorted({type(o).__name__ for o, _, _ in found if not {"momentum", "betas"} & o.defaults.keys()})
        if self.log_momentum and without and trainer.is_global_zero:
            text = f"LearningRateMonitor(log_momentum=True): {', '.join(without)} has no momentum; 0 is logged."
            trainer.notice(text, "warning")

    def on_train_batch_start(self, trainer: TrainerNames, module: Module, batch: Batch, batch_idx: int) -> None:
        done = trainer.global_step
        # with accumulation several batches belong to one step, with several optimizers several steps to one batch
        if self._last_step is not None and done > self._last_step:
            self._steps_a_batch = done - self._last_step
        self._last_step = done
        step = find_log_step(trainer, done + 1, done + self._steps_a_batch)
        if self.logging_interval != "epoch" and step is not None and step != self._logged_step:
            self._logged_step = step
            self._log(trainer, "step", step)

    def on_train_epoch_start(self, trainer: TrainerNames, module: Module) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch", trainer.global_step)

    def _log(self, trainer: TrainerNames, interval: str, step: int) -> None:
        values: dict[str, float] = {}
        for optimizer, own_interval, names in _name_groups(trainer):
            if self.logging_interval is not None or own_interval in (interval, None):
                for group, name in zip(optimizer.param_groups, names, strict=True):
                    values |= self._read(optimizer, group, name)
        values = {f"{self.log_key_prefix}{name}": value for name, value in values.items()}
        trainer.callback_metrics.update({each: torch.tensor(value) for each, value in values.items()})
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=step)

    def _read(self, optimizer: Optimizer, group: dict[str, Value], name: str) -> dict[str, float]:
        values = {name: float(group["lr"])}
        self.lrs.setdefault(name, []).append(values[name])
        if self.log_momentum:
            momentum = float(group["betas"][0] if "betas" in optimizer.defaults else group.get("momentum", 0.0))
            values[f"{name}-momentum"] = self.last_momentum_values[f"{name}-momentum"] = momentum
        if self.log_weight_decay:
            decay = float(group.get("weight_decay", 0.0))
            values[f"{name}-weight_decay"] = self.last_weight_decay_values[f"{name}-weight_decay"] = decay
        return values


def _name_groups(trainer: TrainerNames) -> Iterator[tuple[Optimizer, str | None, list[str]]]:
    """Each optimizer, the interval of its scheduler (None without one) and a name for each of its groups."""
    scheduled = [
        (config.scheduler.optimizer, config.interval, config.name)
        for config in trainer.lr_scheduler_configs
        if hasattr(config.scheduler, "optimizer")
    ]
    others = [o for o in trainer.optimizers if all(o is not seen for seen, _, _ in scheduled)]
    counts: Counter[str] = Counter()
    for optimizer, interval, given in [*scheduled, *((o, None, None) for o in others)]:
        name = given
        if name is None:
            kind = type(optimizer).__name__
            name = f"lr-{kind}-{counts[kind]}" if counts[kind] else f"lr-{kind}"
            counts[kind] += 1
        yield optimizer, interval, _name_each(name, optimizer)


def _name_each(name: str, optimizer: Optimizer) -> list[str]:
    groups = optimizer.param_groups
    if len(groups) == 1:
        return [f"{name}/{groups[0]['name']}" if groups[0].get("name") else name]
    suffixes = [group.get("name") or f"pg{index}" for index, group in enumerate(groups, start=1)]
    twice = sorted(suffix for suffix, count in Counter(suffixes).items() if count > 1)
    if twice:
        raise InvalidArguments(
            f"LearningRateMonitor: the parameter groups of {type(optimizer).__name__} share the names {twice}; "
            "give each group another `name`."
        )
    return [f"{name}/{suffix}" for suffix in suffixes]
