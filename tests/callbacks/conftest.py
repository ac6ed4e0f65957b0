"""A rank made by hand, for callbacks that only read the trainer's attributes; and a small real training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from raylight.config import Config


class HandmadeRank:
    """Has what the callbacks under test read, and keeps what they say."""

    def __init__(self, config: Config, **attributes: Any):
        self.config = config
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.notices: list[tuple[str, str]] = []
        self.logged: list[tuple[int | None, dict[str, float]]] = []
        self.current_epoch = self.global_step = 0
        self.should_stop = False
        self.stage = "train"
        self.fitting = True
        self.world_size = 1
        self.is_global_zero = True
        self.device = torch.device("cpu")
        self.num_training_batches: int | None = None
        self.num_val_batches: list[int | None] = [1]
        self.optimizers: list[torch.optim.Optimizer] = []
        self.lr_scheduler_configs: list[Any] = []
        self.logger: Any = self
        vars(self).update(attributes)

    @property
    def training(self) -> bool:
        return self.stage == "train"

    @property
    def sanity_checking(self) -> bool:
        return self.stage == "sanity"

    def notice(self, text: str, level: str = "info") -> None:
        self.notices.append((text, level))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, metrics))

    def broadcast(self, value: Any, src: int = 0) -> Any:
        return value


@pytest.fixture
def make_rank() -> Callable[..., HandmadeRank]:
    def make(config: dict[str, Any] | None = None, **attributes: Any) -> HandmadeRank:
        return HandmadeRank(Config(**(config or {})), **attributes)

    return make
