"""A batch that broke before it was done: what of it is taken back, and what counts."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from raylight.contract.kinds import Value
from raylight.worker.step.optimizers import Optimizers


def evaluates_often(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step(closure)` may call the closure between two changes of the parameters. torch's own
    optimizers call it once, before any change; but LBFGS."""
    return isinstance(optimizer, LBFGS) or not type(optimizer).step.__module__.startswith("torch.optim")


class StepUndo:
    """An optimizer as it was before a step that changes parameters little by little."""

    @torch.no_grad()
    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.values = [(parameter, parameter.clone()) for parameter in parameters]
        self.state = {key: {name: _copy(value) for name, value in its.items()} for key, its in optimizer.state.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        for parameter, value in self.values:
            parameter.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def _copy(value: Value) -> Value:
    """What LBFGS remembers of earlier steps is a list that grows, of tensors that do not change."""
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


class Schedules:
    """Schedulers, and the options of optimizers that they set, as they were before a batch of manual optimization."""

    def __init__(self, optimizers: Optimizers):
        self.schedulers = [(config.scheduler, config.scheduler.state_dict()) for config in optimizers.schedulers]
        groups = [group for optimizer in optimizers.all for group in optimizer.param_groups]
        self.options = [(group, {key: it for key, it in group.items() if key != "params"}) for group in groups]

    def put_back(self) -> None:
        for scheduler, state in self.schedulers:
            scheduler.load_state_dict(state)
        for group, options in self.options:
            group.update(options)
