"""Optimizers and schedulers: every form that `configure_optimizers` may return, and when a scheduler steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Closure, Output, Scheduler, Value
from raylight.contract.plain_numbers import to_python
from raylight.worker.step.raw_backward import RawBackward

FORMS = (
    "an optimizer; a list of optimizers; ([optimizers], [schedulers]); "
    '{"optimizer": ..., "lr_scheduler": ...}; a list of such dicts; or None'
)
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
SCHEDULER_KEYS = ("scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau")


@dataclass(slots=True)
class SchedulerConfig:
    """One scheduler and when it steps: every `frequency` "step"s or "epoch"s, given `monitor` where it asks for it."""

    scheduler: Scheduler
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool = False


def make_optimizers(returned: Value, automatic: bool = True) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    """What `configure_optimizers` returned, as lists; raises InvalidArguments for anything else. `automatic`: the loop
    steps the schedulers, and must know what one on a plateau watches."""
    optimizers, schedulers = _split(returned)
    mistakes = [f"{_what(o)} is not an optimizer" for o in optimizers if not hasattr(o, "param_groups")]
    configs = []
    for given in schedulers:
        try:
            configs.append(_scheduler_config(given, automatic))
        except InvalidArguments as error:
            mistakes += error.mistakes
    if mistakes:
        raise InvalidArguments([f"configure_optimizers: {m}. It may return {FORMS}." for m in mistakes])
    return optimizers, configs


def _split(returned: Value) -> tuple[list[Value], list[Value]]:
    if returned is None:
        return [], []
    if isinstance(returned, dict):
        return _split_dicts([returned])
    if isinstance(returned, (list, tuple)):
        if returned and all(isinstance(item, dict) for item in returned):
            return _split_dicts(list(returned))
        if len(returned) == 2 and all(isinstance(part, (list, tuple)) for part in returned):
            return list(returned[0]), list(returned[1])
        if len(returned) == 2 and isinstance(returned[0], (list, tuple)) and not hasattr(returned[1], "param_groups"):
            return list(returned[0]), [returned[1]]
        return list(returned), []
    return [returned], []


def _split_dicts(dicts: list[dict[str, Value]]) -> tuple[list[Value], list[Value]]:
    unknown = sorted({key for d in dicts for key in d} - {"optimizer", "lr_scheduler", "frequency", "monitor"})
    if unknown or any("optimizer" not in d for d in dicts):
        reason = f"unknown keys {unknown}" if unknown else 'a dict without "optimizer"'
        raise InvalidArguments(f"configure_optimizers: {reason}. It may return {FORMS}.")
    schedulers: list[Value] = []
    for d in dicts:
        given = d.get("lr_scheduler")
        if given is not None and "monitor" in d and not isinstance(given, dict):
            given = {"scheduler": given, "monitor": d["monitor"]}
        elif isinstance(given, dict) and "monitor" in d:
            given = {"monitor": d["monitor"], **given}
        schedulers += given if isinstance(given, (list, tuple)) else [given] if given is not None else []
    return [d["optimizer"] for d in dicts], schedulers


def _scheduler_config(given: Value, automatic: bool) -> SchedulerConfig:
    if not isinstance(given, dict):
        given = {"scheduler": given}
    unknown = sorted(set(given) - set(SCHEDULER_KEYS))
    if unknown:
        raise InvalidArguments(f"a scheduler has the unknown keys {unknown}; allowed are {list(SCHEDULER_KEYS)}")
    config = SchedulerConfig(**{key: to_python(value) for key, value in given.items()})
    if not callable(getattr(config.scheduler, "step", None)):
        raise InvalidArguments(f"{_what(config.scheduler)} is not a scheduler: it has no step()")
    if config.interval not in ("step", "epoch"):
        raise InvalidArguments(f'interval={config.interval!r} of a scheduler; allowed are "step" and "epoch"')
    if not isinstance(config.frequency, int) or config.frequency < 1:
        raise InvalidArguments(f"frequency={config.frequency!r} of a scheduler; an int of at least 1 is needed")
    config.reduce_on_plateau |= isinstance(config.scheduler, ReduceLROnPlateau)
    if config.reduce_on_plateau and config.monitor is None and automatic:
        raise InvalidArguments(
            'ReduceLROnPlateau needs the metric it watches: {"scheduler": scheduler, "monitor": "val_loss"}'
        )
    return config


def check_schedulers(optimizers: list[Optimizer], configs: list[SchedulerConfig]) -> list[str]:
    """A scheduler whose optimizer was not returned would change the learning rate of nothing."""
    return [
        f"configure_optimizers: {_what(config.scheduler)} belongs to an optimizer that was not returned"
        for config in configs
        if isinstance(config.scheduler, LRScheduler)
        and isinstance(getattr(config.scheduler, "optimizer", None), Optimizer)
        and all(config.scheduler.optimizer is not optimizer for optimizer in optimizers)
    ]


class NoOptimizer(Optimizer):
    """Stands for None where `configure_optimizers` returned that: a step counts and changes nothing."""

    def __init__(self) -> None:
        super().__init__([Tensor([0.0])], {})
        self.param_groups.clear()

    def step(self, closure: Closure | None = None) -> Output:
        return closure() if closure is not None else None

    def __repr__(self) -> str:
        return "No Optimizer"


class Optimizers:
    """What `configure_optimizers` returned."""

    def __init__(self) -> None:
        self.all: list[Optimizer] = []
        self.schedulers: list[SchedulerConfig] = []
        self.configured: dict[str, list[Value]] = {}
        """Their options before the first step, as optimizer_options.describe gives them."""

        self._raw_backward: RawBackward | None = None

    def watch_raw_backward(self) -> RawBackward:
        """From here on a step on gradients of one rank alone is an error."""
        if self._raw_backward is None:
            self._raw_backward = RawBackward(self.all)
        self._raw_backward.watch(True)
        return self._raw_backward

    def rest_raw_backward(self) -> None:
        """The group has shrunk to one rank."""
        if self._raw_backward is not None:
            self._raw_backward.watch(False)

    def configure(self, described: dict[str, list[Value]]) -> None:
        self.configured = described

    def take(self, optimizers: list[Optimizer], schedulers: list[SchedulerConfig]) -> None:
        self.all, self.schedulers = optimizers, schedulers

    @property
    def parameters(self) -> list[Tensor]:
        """What they train."""
        return [p for optimizer in self.all for group in optimizer.param_groups for p in group["params"]]

    @property
    def state_tensors(self) -> list[Tensor]:
        """What they keep beside the parameters."""
        states = (state for optimizer in self.all for state in optimizer.state.values())
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def steps_every(self, interval: str) -> bool:
        return any(config.interval == interval for config in self.schedulers)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` cannot do without a function that evaluates the loss."""
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    return bool(parameters) and parameters[0].default is parameters[0].empty and parameters[0].kind in POSITIONAL


def do_nothing_closure() -> None:
    """A closure for `optimizer.step` that computes nothing."""


class SteppingOptimizer:
    """The optimizer as manual optimization sees it: `step` is counted, scaled and announced to the hooks.

    Everything else is the wrapped optimizer's own.
    """

    def __init__(self, optimizer: Optimizer, step: Callable[[Optimizer, Closure | None], Output]):
        self.optimizer = optimizer
        self._step = step

    def step(self, closure: Closure | None = None, **_: Any) -> Output:
        return self._step(self.optimizer, closure)

    def __getattr__(self, name: str) -> Value:
        return getattr(self.optimizer, name)


def _what(value: Value) -> str:
    return f"{value!r:.80} ({type(value).__name__})" if isinstance(value, (str, int, float)) else type(value).__name__
