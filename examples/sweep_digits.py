"""Search for a good network for handwritten digits: trials of two Ray workers, the weak ones stopped early by ASHA.

python examples/sweep_digits.py                     12 trials, about a minute
python examples/sweep_digits.py --num-workers 0     each trial in one process
python examples/sweep_digits.py --resume            go on with a sweep that was interrupted
"""

import argparse

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import raylight


class Digits(raylight.Module):
    """A small convolutional network for 8 x 8 grey images of the digits 0 to 9."""

    def __init__(self, lr: float, hidden: int, dropout: float):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(dropout), nn.Linear(32 * 4 * 4, hidden), nn.ReLU(), nn.Linear(hidden, 10),
        )  # fmt: skip

    def training_step(self, batch):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        scores = self.net(images)
        self.log("val_loss", F.cross_entropy(scores, labels))
        self.log("val_accuracy", (scores.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def make_loaders(config):
    """The batch size is searched too, so that each trial has loaders of its own."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    dataset = TensorDataset(images, torch.tensor(labels))
    train, val = random_split(dataset, [1397, 400], generator=torch.Generator().manual_seed(0))
    return DataLoader(train, config["batch_size"], shuffle=True), DataLoader(val, 100)


SPACE = {
    "lr": tune.loguniform(1e-4, 1e-1),
    "hidden": tune.choice([32, 64, 128]),
    "dropout": tune.uniform(0.0, 0.5),
    "batch_size": tune.choice([16, 32, 64]),
}

parser = argparse.ArgumentParser(description="Search hyperparameters on the digits that scikit-learn ships.")
parser.add_argument("--num-samples", type=int, default=12, help="trials")
parser.add_argument("--num-workers", type=int, default=2, help="Ray workers of each trial; 0: in its own process")
parser.add_argument("--max-epochs", type=int, default=9)
parser.add_argument("--storage-path", default="runs", help="a path or URI that all workers reach")
parser.add_argument("--name", default="sweep_digits", help="the run's name; each trial is a version of it")
parser.add_argument("--resume", action="store_true", help="go on with the newest sweep of this name")

if __name__ == "__main__":
    results = raylight.sweep(
        Digits, SPACE, data=make_loaders, metric="val_accuracy", mode="max", seed=0,
        scheduler=ASHAScheduler(grace_period=1, reduction_factor=3, max_t=9), **vars(parser.parse_args()),
    )  # fmt: skip
    best = results.get_best_result()
    Digits.load_from_checkpoint(best.metrics["best_checkpoint"])
    print(f"Validation accuracy: {best.metrics['val_accuracy']:.2%} with {best.config}")
