"""Population based training on handwritten digits: weak trials take over the weights of strong ones, and go on with
another learning rate and weight decay.

    python examples/pbt_digits.py                        4 trials, each in one process, about half a minute
    python examples/pbt_digits.py --num-workers 2        each of two Ray workers
"""

import argparse

import torch
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import raylight


class Digits(raylight.Module):
    """A perceptron for 8 x 8 grey images of the digits 0 to 9."""

    def __init__(self, lr: float, weight_decay: float):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.net(images), labels))

    def configure_optimizers(self):
        options = {"lr": self.hparams.lr, "weight_decay": self.hparams.weight_decay}
        return torch.optim.SGD(self.parameters(), momentum=0.9, **options)


def make_loaders():
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, val = random_split(dataset, [1397, 400], generator=torch.Generator().manual_seed(0))
    return DataLoader(train, 32, shuffle=True), DataLoader(val, 200)


parser = argparse.ArgumentParser(description="Train a population on the digits that scikit-learn ships.")
parser.add_argument("--num-samples", type=int, default=4, help="trials")
parser.add_argument("--num-workers", type=int, default=0, help="Ray workers of each trial; 0: in its own process")
parser.add_argument("--max-epochs", type=int, default=12)
parser.add_argument("--storage-path", default="runs", help="a path or URI that all workers reach")
parser.add_argument("--name", default="pbt_digits", help="the run's name; each trial is a version of it")

if __name__ == "__main__":
    population = PopulationBasedTraining(
        time_attr="epoch", perturbation_interval=3, quantile_fraction=0.5,
        hyperparam_mutations={"lr": tune.loguniform(1e-3, 1.0), "weight_decay": tune.loguniform(1e-6, 1e-2)},
    )  # fmt: skip
    space = {"lr": tune.loguniform(1e-4, 1.0), "weight_decay": tune.loguniform(1e-6, 1e-2)}
    results = raylight.sweep(
        Digits, space, data=make_loaders(), metric="val_loss", mode="min", scheduler=population, seed=0,
        **vars(parser.parse_args()),
    )  # fmt: skip

    for result in results:
        trial = raylight.open_run(result.metrics["version"]).record["trial"]
        print(f"{trial['name']}: val_loss {result.metrics['val_loss']:.4f} with lr={result.config['lr']:.4g}")
        for clone in trial["clones"]:
            print(f"  at step {clone['step']} took over {clone['trial']}, then lr={clone['config']['lr']:.4g}")
