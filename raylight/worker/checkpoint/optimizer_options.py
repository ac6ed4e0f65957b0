"""New hyperparameters for a state that was trained with others: where they differ, the new ones win."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from raylight.contract.kinds import StateDict, Value
from raylight.worker.checkpoint.state import Configured, ReplicatedState
from raylight.worker.step.optimizers import SchedulerConfig

SCALED = ("lr", "_last_lr")
"""What a schedule moves: the new value, times what the schedule has made of the old one so far."""


def describe(optimizers: list[Optimizer], schedulers: list[SchedulerConfig]) -> Configured:
    """What configure_optimizers has chosen, before a step changes it: the options of each parameter group, and the
    state of each scheduler."""
    return {
        "optimizers": [[_options(group) for group in optimizer.param_groups] for optimizer in optimizers],
        "schedulers": [_copy(config.scheduler.state_dict()) for config in schedulers],
    }


def renew(saved: ReplicatedState, configured: Configured) -> tuple[list[StateDict], list[StateDict]]:
    """The optimizer and scheduler states of a checkpoint, with those options that `configured` has and the run that
    saved it had not. Momentum and other state of the parameters stay."""
    optimizers, schedulers = list(saved["optimizers"]), list(saved["schedulers"])
    before = saved.get("configured")
    if before is None:
        return optimizers, schedulers
    groups = [state["param_groups"] for state in optimizers]
    groups = _merge(groups, before["optimizers"], configured["optimizers"])
    optimizers = [{**state, "param_groups": renewed} for state, renewed in zip(optimizers, groups, strict=True)]
    return optimizers, _merge(schedulers, before["schedulers"], configured["schedulers"])


def _merge(now: Value, before: Value, after: Value, name: str = "") -> Value:
    """`now` has grown out of `before`; where `after` differs from that, it is taken."""
    if isinstance(now, dict) and isinstance(before, Mapping) and isinstance(after, Mapping):
        known = before.keys() & after.keys()
        return {key: _merge(now[key], before[key], after[key], str(key)) if key in known else now[key] for key in now}
    lists = [value for value in (now, before, after) if isinstance(value, list)]
    if len({len(value) for value in lists}) == 1 and len(lists) == 3:
        return [_merge(one, old, new, name) for one, old, new in zip(*lists, strict=True)]
    if _is_same(before, after):
        return now
    if name in SCALED and not _is_same(now, before) and before:
        return now * (after / before)
    return after


def _is_same(one: Value, other: Value) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def _options(group: StateDict) -> StateDict:
    return {name: _copy(value) for name, value in group.items() if name != "params"}


def _copy(value: Value) -> Value:
    """Lists and dicts are changed in place by schedulers."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
