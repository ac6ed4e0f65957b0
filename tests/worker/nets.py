"""Small modules and loaders whose numbers can be worked out by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl


def make_loader(num_samples: int = 8, batch_size: int = 2) -> DataLoader[Any]:
    """Samples 0, 1, 2, …, in order."""
    return DataLoader(TensorDataset(torch.arange(float(num_samples)).unsqueeze(1)), batch_size=batch_size)


class Line(pl.Module):
    """The gradient of its weight is the mean of the batch."""

    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.lr = lr
        self.trained: list[float] = []
        """The first sample of each batch."""

    def training_step(self, batch: Any) -> torch.Tensor:
        self.trained.append(batch[0][0].item())
        loss = (self.weight * batch[0]).mean()
        self.log("loss", batch[0].mean(), on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self.log("val_loss", batch[0].mean())

    def test_step(self, batch: Any) -> None:
        self.log("test_loss", batch[0].mean())

    def predict_step(self, batch: Any) -> torch.Tensor:
        return batch[0].sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)
