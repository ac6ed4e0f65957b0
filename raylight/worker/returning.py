"""What the caller's own objects receive after training in another process."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor

from raylight.contract.messages import Trained
from raylight.user.data_module import DataModule
from raylight.user.run_view import PLAIN, RunView
from raylight.worker.worker import Worker

_INTERNALS = set(vars(torch.nn.Module())) | {"_trainer", "_modes", "_toggled"}


def gather_trained(worker: Worker, view: RunView) -> Trained:
    """Weights on the CPU, and attributes of module, data module, callbacks and trainer that can be sent."""
    state = worker.module.state_dict()
    trainer, data_module = worker.hooks.trainer, worker.data_module
    return Trained(
        weights={name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in state.items()},
        module=_sendable(worker.module, _INTERNALS),
        data_module=_sendable(data_module, {"trainer"}) if isinstance(data_module, DataModule) else {},
        callbacks=[_sendable(callback, set()) for callback in worker.hooks.callbacks],
        trainer=_sendable(trainer, set(trainer._stays)),
        facts={name: getattr(view, name) for name in PLAIN},
    )


def _sendable(owner: object, skip: set[str]) -> dict[str, Any]:
    found = {}
    for name, value in vars(owner).items():
        if name in skip or isinstance(value, torch.nn.Module):
            continue
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, TypeError, AttributeError):
            continue
        found[name] = value
    return found
