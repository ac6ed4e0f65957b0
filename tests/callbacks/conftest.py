"""A trainer made by hand, for callbacks that only read the trainer's attributes; and a small real training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.contract.config import Config

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it


class HandmadeTrainer:
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
        self.num_val_batches: list[int | float] = [1]
        self.optimizers: list[torch.optim.Optimizer] = []
        self.lr_scheduler_configs: list[Any] = []
        self.logger: Any = self
        vars(self).update(attributes)

    @property
    def loggers(self) -> list[Any]:
        return [self.logger] if self.logger else []

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

    def finish_copying(self) -> None: ...

    def broadcast(self, value: Any, src: int = 0) -> Any:
        return value


@pytest.fixture
def make_rank() -> Callable[..., HandmadeTrainer]:
    def make(config: dict[str, Any] | None = None, **attributes: Any) -> HandmadeTrainer:
        return HandmadeTrainer(Config(**(config or {})), **attributes)

    return make


class Net(pl.Module):
    """Regression on 4 features; `norm` adds batch norm."""

    def __init__(self, norm: bool = False, lr: float = 0.05, momentum: float = 0.9):
        super().__init__()
        torch.manual_seed(1)
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh())
        self.head = nn.Linear(8, 1)
        self.lr, self.momentum = lr, momentum

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.head(self.backbone(x)), y)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        return self.head(self.backbone(batch[0]))

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr, momentum=self.momentum)


def make_data(num_samples: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num_samples, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


@pytest.fixture
def make_net() -> Callable[..., Net]:
    return Net


@pytest.fixture
def fit(tmp_path: Any) -> Callable[..., Any]:
    """Fits a net in this process on 6 batches of 8, in order; returns the trainer."""

    def run(net: Net, *callbacks: Any, resume: Any = None, data: Any = None, **arguments: Any) -> pl.Trainer:
        loader = DataLoader(data or make_data(), batch_size=8)
        options = {"num_workers": 0, "max_epochs": 4, "storage_path": str(tmp_path), "enable_progress_bar": False}
        options |= {"enable_model_summary": False, "log_every_n_steps": 1, "seed": 3} | arguments
        trainer = pl.Trainer(callbacks=list(callbacks), **options)
        trainer.fit(net, loader, DataLoader(data or make_data(), batch_size=16), ckpt_path=resume)
        return trainer

    return run


@pytest.fixture
def dataset() -> TensorDataset:
    return make_data()


@pytest.fixture
def make_samples() -> Callable[[int], TensorDataset]:
    return make_data
