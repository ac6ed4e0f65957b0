"""The sweeps that benchmarks/sweep.py times: the same trials by each library, as its documentation shows it.

    python benchmarks/sweep_scripts.py raylight|ray_train FILE

Each joins the Ray that RAY_ADDRESS names, and writes to FILE how many seconds its sweep took.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

import torch
from ray import tune
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

NUM_WORKERS = 2
NUM_EPOCHS = 3
NUM_STEPS = 20
BATCH_SIZE = 32
RATES = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2]
NUM_CPUS = 8


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def make_loaders() -> tuple[DataLoader, DataLoader]:
    num_samples, generator = NUM_WORKERS * NUM_STEPS * BATCH_SIZE, torch.Generator().manual_seed(0)
    images = torch.randn(2 * num_samples, 784, generator=generator)
    labels = torch.randint(10, (2 * num_samples,), generator=generator)
    train, val = (TensorDataset(images[part::2], labels[part::2]) for part in (0, 1))
    return DataLoader(train, BATCH_SIZE, shuffle=True), DataLoader(val, BATCH_SIZE)


def sweep_raylight() -> Any:
    import raylight

    class Net(raylight.Module):
        def __init__(self, lr: float):
            super().__init__()
            self.lr, self.net = lr, make_net()

        def training_step(self, batch: Any) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    return raylight.sweep(
        Net, {"lr": tune.grid_search(RATES)}, num_samples=1, metric="val_loss", mode="min", data=make_loaders(),
        num_workers=NUM_WORKERS, max_epochs=NUM_EPOCHS,
    )  # fmt: skip


def train_loop_per_worker(config: dict[str, Any]) -> None:
    from ray import train
    from ray.train.torch import prepare_data_loader, prepare_model

    net = prepare_model(make_net())
    train_loader, val_loader = map(prepare_data_loader, make_loaders())
    optimizer = torch.optim.Adam(net.parameters(), lr=config["lr"])
    for epoch in range(NUM_EPOCHS):
        train_loader.sampler.set_epoch(epoch)
        for images, labels in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
        with torch.no_grad():
            losses = [F.cross_entropy(net(images), labels).item() for images, labels in val_loader]
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if train.get_context().get_world_rank() == 0:
                state = {"net": net.module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
                torch.save(state, os.path.join(folder, "state.pt"))
                checkpoint = train.Checkpoint.from_directory(folder)
            train.report({"val_loss": sum(losses) / len(losses)}, checkpoint=checkpoint)


def sweep_ray_train() -> Any:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    folder = os.path.abspath("ray_train")

    def train_driver(config: dict[str, Any]) -> None:
        TorchTrainer(
            train_loop_per_worker,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=NUM_WORKERS),
            run_config=RunConfig(
                name=f"train-{tune.get_context().get_trial_id()}", storage_path=folder, callbacks=[TuneReportCallback()]
            ),
        ).fit()

    # Its guide: what the cluster has, divided by what a trial takes. That is a CPU for the driver too.
    limit = NUM_CPUS // (NUM_WORKERS + 1)
    return tune.Tuner(
        train_driver,
        param_space={"lr": tune.grid_search(RATES)},
        tune_config=tune.TuneConfig(metric="val_loss", mode="min", max_concurrent_trials=limit),
        run_config=tune.RunConfig(name="sweep", storage_path=folder),
    ).fit()


SWEEPS = {"raylight": sweep_raylight, "ray_train": sweep_ray_train}


def main(name: str, path: str) -> None:
    start = time.perf_counter()
    results = SWEEPS[name]()
    seconds = time.perf_counter() - start
    iterations = [result.metrics["training_iteration"] for result in results]
    assert iterations == [NUM_EPOCHS] * len(RATES), f"not all trials came to their end: {iterations}, {results.errors}"
    with open(path, "w") as file:
        file.write(str(seconds))


if __name__ == "__main__":
    main(sys.argv[1], os.path.abspath(sys.argv[2]))
