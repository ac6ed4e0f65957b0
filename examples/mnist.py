"""MNIST: a data module that downloads once a node, and a network that reaches 98 % in two epochs.

python examples/mnist.py                       in this process, or a worker for each GPU where there are several
python examples/mnist.py --num-workers 2       two Ray workers
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

import raylight


class Images(raylight.DataModule):
    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def prepare_data(self):  # once on each node; the other workers of the node wait
        try:
            MNIST(self.path, download=True)
        except RuntimeError as error:  # torchvision tried all its mirrors
            advice = f"Put its four files, unpacked, into {self.path}/MNIST/raw, or run examples/digits.py."
            raise raylight.DataError(f"MNIST cannot be downloaded from here. {advice}") from error

    def load(self, train: bool) -> TensorDataset:
        images = MNIST(self.path, train=train)
        return TensorDataset(images.data.unsqueeze(1).float() / 255, images.targets)

    def train_dataloader(self):
        return DataLoader(self.load(train=True), batch_size=64, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.load(train=False), batch_size=500)


class Classifier(raylight.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 5 * 5, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip

    def training_step(self, batch):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch):
        images, labels = batch
        self.log("test_accuracy", (self.net(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


parser = argparse.ArgumentParser(description="Train on MNIST.")
parser.add_argument("--data-path", type=Path, default=Path("data"), help="where MNIST is, or is downloaded to")
parser.add_argument("--num-workers", type=int, default=argparse.SUPPRESS, help="Ray workers; 0: in this process")
parser.add_argument("--max-epochs", type=int, default=2)

if __name__ == "__main__":
    arguments = vars(parser.parse_args())
    images = Images(arguments.pop("data_path").absolute())
    trainer = raylight.Trainer(name="mnist", **arguments)
    try:
        result = trainer.fit(Classifier(), datamodule=images)
    except raylight.RaylightError as error:
        sys.exit(str(error))
    [metrics] = trainer.test(datamodule=images)
    print(f"Test accuracy {metrics['test_accuracy']:.2%}, stored in {result.path}")
