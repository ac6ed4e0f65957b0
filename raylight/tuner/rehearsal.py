"""Rehearsal: a few steps of a run on copies, as often as wanted."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from raylight.contract.config import Config
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.contract.seeding import isolate_rng
from raylight.contract.task import Loaders
from raylight.user.callback import Callback
from raylight.user.data_module import DataModule
from raylight.user.module import Module


class Rehearsing(Protocol):
    """The part of a trainer that a rehearsal needs."""

    config: Config

    @property
    def world_size(self) -> int: ...
    def rehearse(
        self, stage: str, model: Module, loaders: Loaders, callbacks: Sequence[Callback], changes: dict[str, Value]
    ) -> None: ...


def as_rehearsing(trainer: Value) -> Rehearsing:
    """A trainer of hooks, which can rehearse where it is a raylight.Trainer."""
    if not hasattr(trainer, "rehearse"):
        raise InvalidArguments(f"{type(trainer).__name__} is no raylight.Trainer, so it cannot be tuned")
    found: Rehearsing = trainer
    return found


class Rehearsal:
    """What was to be run, and copies of it that may be spoilt.

    The caller's module, data module, optimizers, callbacks and random numbers are not touched at all. A data module is
    copied with its attributes, not with the data that these hold.
    """

    def __init__(self, trainer: Rehearsing, stage: str, module: Module, loaders: Loaders):
        self.trainer, self.stage, self.module, self.loaders = trainer, stage, module, loaders

    @property
    def data_module(self) -> DataModule | None:
        found: DataModule | None = self.loaders.data_module
        return found

    def copy(self) -> tuple[Module, DataModule | None]:
        return copy.deepcopy(self.module), copy.copy(self.data_module)

    def run(
        self, module: Module, data_module: DataModule | None, callbacks: Sequence[Callback], changes: dict[str, Value]
    ) -> None:
        """Runs the copies; `changes` are fields of the configuration. What it held is free when it returns or
        raises."""
        loaders = replace(self.loaders, data_module=data_module)
        try:
            with isolate_rng():
                self.trainer.rehearse(self.stage, module, loaders, callbacks, changes)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
