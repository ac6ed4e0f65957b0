"""What the loop adds to a step of ten milliseconds or more: it should be lost in the noise, under 1 %.

Raw loop and raylight take turns, and which goes first alternates, so that a drift of the machine falls on both; the
ratio is taken within each pair, and the median over the pairs counts.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raylight
from benchmarks.figures import Figure, show
from benchmarks.terminal import unseen_terminal

NUM_STEPS = 100
NUM_WARM_UP_STEPS = 10
NUM_PAIRS = 15
BATCH_SIZE = 128


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def make_loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    num_samples = NUM_STEPS * BATCH_SIZE
    images = torch.randn(num_samples, 784, generator=generator)
    labels = torch.randint(10, (num_samples,), generator=generator)
    return DataLoader(TensorDataset(images, labels), BATCH_SIZE, shuffle=True)


class Net(raylight.Module):
    def __init__(self, starts: list[float]):
        super().__init__()
        self.net = make_net()
        self.mark = lambda: starts.append(perf_counter())

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.mark()
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def run_raylight(loader: DataLoader, starts: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder, unseen_terminal():
        raylight.fit(Net(starts), loader, num_workers=0, max_epochs=1, storage_path=folder, checkpoint=False)


def run_raw(loader: DataLoader, starts: list[float]) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for images, labels in loader:
        starts.append(perf_counter())
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()


def ms_per_step(run: Callable[[DataLoader, list[float]], None], loader: DataLoader) -> float:
    starts: list[float] = []
    run(loader, starts)
    if len(starts) != NUM_STEPS:
        raise RuntimeError(f"{len(starts)} steps were made instead of {NUM_STEPS}")
    return (starts[-1] - starts[NUM_WARM_UP_STEPS]) / (NUM_STEPS - 1 - NUM_WARM_UP_STEPS) * 1e3


def measure() -> list[Figure]:
    loader = make_loader()
    raw, ours = [], []
    for pair in range(NUM_PAIRS):
        print(f"large step: pair {pair + 1} of {NUM_PAIRS}", flush=True)
        turns = [(run_raw, raw), (run_raylight, ours)]
        for run, times in reversed(turns) if pair % 2 else turns:
            times.append(ms_per_step(run, loader))
    ratio = statistics.median(mine / its for mine, its in zip(ours, raw, strict=True))
    return [
        Figure("raw loop", statistics.median(raw), "ms a step"),
        Figure("raylight", statistics.median(ours), "ms a step"),
        Figure("raylight over raw loop", ratio, "times", at_most=1.01),
    ]


if __name__ == "__main__":
    show("Large step (784-1024-1024-10, batch 128, a value logged at every step)", measure())
