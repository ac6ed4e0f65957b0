"""One program for two libraries: module, data and encoder of a command line, in raylight and in Lightning."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import raylight


class Encoder(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.width, self.layer = width, nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideEncoder(Encoder):
    def __init__(self, factor: int) -> None:
        super().__init__(3 * factor)


def make_net(library: ModuleType) -> type:
    class Net(library.LightningModule):
        def __init__(self, encoder: Encoder, lr: float = 0.1, label: str = "none") -> None:
            super().__init__()
            self.save_hyperparameters()
            self.encoder, self.head, self.lr = encoder, nn.Linear(encoder.width, 1), lr

        def loss(self, name: str, batch: Tensor) -> Tensor:
            loss = (self.head(self.encoder(batch)) - 1).pow(2).mean()
            self.log(name, loss)
            return loss

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.loss("loss", batch)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.loss("val_loss", batch)

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.loss("test_loss", batch)

        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.head(self.encoder(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return Net


def make_data(library: ModuleType) -> type:
    class Data(library.LightningDataModule):
        def __init__(self, batch_size: int = 4, num_samples: int = 16) -> None:
            super().__init__()
            self.batch_size, self.num_samples = batch_size, num_samples

        def loader(self) -> DataLoader:
            samples = torch.randn(self.num_samples, 4, generator=torch.Generator().manual_seed(0))
            return DataLoader(samples, batch_size=self.batch_size)

        train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader

    return Data


Net, Data = make_net(raylight), make_data(raylight)
LightningNet, LightningData = make_net(pytorch_lightning), make_data(pytorch_lightning)
for made, name in ((Net, "Net"), (Data, "Data"), (LightningNet, "LightningNet"), (LightningData, "LightningData")):
    made.__name__ = made.__qualname__ = name

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": True, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
ENCODER = f"--model.encoder={__name__}.Encoder"
Change = Callable[[Any], None]
