"""A small training for loggers, in this process or on workers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it


class Net(pl.Module):
    """Two epochs of five steps; `at_epoch_end(module)` is what a test does in a hook."""

    def __init__(self, lr: float = 0.1, layers: dict | None = None):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(3, 1)
        self.at_epoch_end: Callable[[Any], None] | None = None

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.layer(batch[0]) - batch[1]).square().mean())

    def on_train_epoch_end(self):
        if self.at_epoch_end is not None:
            self.at_epoch_end(self)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


@pytest.fixture
def train(tmp_path) -> Callable[..., tuple[Net, pl.Trainer]]:
    def run(logger: Any, at_epoch_end: Any = None, net: Net | None = None, **arguments: Any):
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(2))
        loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
        options = {"num_workers": 0, "use_gpu": False, "max_epochs": 2, "log_every_n_steps": 5} | arguments
        trainer = pl.Trainer(
            logger=logger, storage_path=str(tmp_path / "runs"), enable_progress_bar=False, enable_model_summary=False,
            **options,
        )  # fmt: skip
        net = net or Net(layers={"sizes": (3, 1)})
        net.at_epoch_end = at_epoch_end
        trainer.fit(net, loader, loader)
        return net, trainer

    return run


@pytest.fixture
def make_net() -> type[Net]:
    return Net
