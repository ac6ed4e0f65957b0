"""Handwritten digits: train on two Ray workers, test, and say where everything is stored.

python examples/digits.py                      two workers on this machine, a few seconds after Ray is up
python examples/digits.py --num-workers 0      the same in this process
python examples/digits.py --resume last        go on where the newest version stopped
python examples/digits.py --help
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import raylight


class Digits(raylight.Module):
    """A small convolutional network for 8 x 8 grey images of the digits 0 to 9."""

    def __init__(self, hidden: int = 128, lr: float = 5e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(32 * 4 * 4, hidden), nn.ReLU(), nn.Linear(hidden, 10),
        )  # fmt: skip

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch):
        self.log_accuracy("val", batch)

    def test_step(self, batch):
        self.log_accuracy("test", batch)

    def log_accuracy(self, stage, batch):
        images, labels = batch
        scores = self(images)
        self.log(f"{stage}_loss", F.cross_entropy(scores, labels))
        self.log(f"{stage}_accuracy", (scores.argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


parser = argparse.ArgumentParser(description="Train on the handwritten digits that scikit-learn ships.")
parser.add_argument("--num-workers", type=int, default=2, help="Ray workers; 0 trains in this process")
parser.add_argument("--max-epochs", type=int, default=20)
parser.add_argument("--precision", default="32-true", help='such as "bf16-mixed"')
parser.add_argument("--storage-path", default="runs", help="a path or URI that all workers reach")
parser.add_argument("--name", default="digits", help="the run's name under the storage path")
parser.add_argument("--resume", help='"last", "best" or the path of a checkpoint')

if __name__ == "__main__":
    arguments = vars(parser.parse_args())
    resume = arguments.pop("resume")

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    dataset = TensorDataset(images, torch.tensor(labels))
    train, val, test = random_split(dataset, [1197, 200, 400], generator=torch.Generator().manual_seed(0))

    trainer = raylight.Trainer(seed=0, checkpoint=raylight.Checkpointing(monitor="val_loss"), **arguments)
    result = trainer.fit(Digits(), DataLoader(train, 32, shuffle=True), DataLoader(val, 100), ckpt_path=resume)
    [metrics] = trainer.test(dataloaders=DataLoader(test, 100))
    print(f"Test accuracy: {metrics['test_accuracy']:.2%}")
    print(f"Stored in:     {result.path}\nLook at it:    tensorboard --logdir {result.path}")
