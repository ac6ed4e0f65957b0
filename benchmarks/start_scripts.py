"""The scripts that benchmarks/start.py times: the same training by each library, as its documentation shows it.

    python benchmarks/start_scripts.py in_process|raw|lightning|ray|lightning_ddp|ray_train FILE

Each appends to FILE the time of day when the training was asked for and when rank 0 began its first batch.
Imports are inside the functions, so that a script pays for its own library alone.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

NUM_STEPS = 20
BATCH_SIZE = 32


def mark(path: str, event: str) -> None:
    with open(path, "a") as file:
        file.write(f"{event} {time.time()}\n")


def make_dataset() -> Any:
    import torch

    num_samples = 2 * NUM_STEPS * BATCH_SIZE
    return torch.utils.data.TensorDataset(torch.randn(num_samples, 784), torch.randint(10, (num_samples,)))


def make_net() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def module_class(parent: type) -> type:
    from torch.nn import functional as F
    from torch.optim import Adam

    class Net(parent):  # type: ignore[misc]
        def __init__(self, path: str):
            super().__init__()
            self.path, self.net = path, make_net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 0 and self.global_rank == 0:
                mark(self.path, "batch")
            images, labels = batch
            return F.cross_entropy(self.net(images), labels)

        def configure_optimizers(self) -> Any:
            return Adam(self.parameters(), lr=1e-3)

    return Net


def train_raylight(path: str, num_workers: int) -> None:
    from torch.utils.data import DataLoader

    import raylight

    net, loader = module_class(raylight.Module)(path), DataLoader(make_dataset(), BATCH_SIZE, shuffle=True)
    mark(path, "call")
    raylight.fit(net, loader, num_workers=num_workers, max_epochs=1)


def train_lightning(path: str, num_workers: int) -> None:
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    net, loader = module_class(pl.LightningModule)(path), DataLoader(make_dataset(), BATCH_SIZE, shuffle=True)
    if "LOCAL_RANK" not in os.environ:  # its ddp runs this script once more for each further rank
        mark(path, "call")
    scale: dict[str, Any] = {"strategy": "ddp", "devices": num_workers} if num_workers else {"devices": 1}
    pl.Trainer(accelerator="cpu", max_epochs=1, **scale).fit(net, loader)


def train_raw(path: str) -> None:
    import torch
    from torch.nn import functional as F

    net, loader = make_net(), torch.utils.data.DataLoader(make_dataset(), BATCH_SIZE, shuffle=True)
    mark(path, "call")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for index, (images, labels) in enumerate(loader):
        if index == 0:
            mark(path, "batch")
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def ray_train_loop(config: dict[str, Any]) -> None:
    import torch
    from ray import train
    from ray.train.torch import prepare_data_loader, prepare_model
    from torch.nn import functional as F

    net = prepare_model(config["net"])
    loader = prepare_data_loader(torch.utils.data.DataLoader(config["dataset"], BATCH_SIZE, shuffle=True))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for index, (images, labels) in enumerate(loader):
        if index == 0 and train.get_context().get_world_rank() == 0:
            mark(config["path"], "batch")
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
    train.report({"loss": loss.item()})


def train_ray_train(path: str) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = {"path": path, "net": make_net(), "dataset": make_dataset()}
    mark(path, "call")
    scale, place = ScalingConfig(num_workers=2), RunConfig(storage_path=os.path.abspath("ray_train"))
    TorchTrainer(ray_train_loop, train_loop_config=config, scaling_config=scale, run_config=place).fit()


SCRIPTS = {
    "in_process": lambda path: train_raylight(path, num_workers=0),
    "lightning": lambda path: train_lightning(path, num_workers=0),
    "raw": train_raw,
    "ray": lambda path: train_raylight(path, num_workers=2),
    "lightning_ddp": lambda path: train_lightning(path, num_workers=2),
    "ray_train": train_ray_train,
}

if __name__ == "__main__":
    SCRIPTS[sys.argv[1]](os.path.abspath(sys.argv[2]))
