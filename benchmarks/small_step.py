"""What a small step costs: 784-128-10 perceptron, batch 32, in-memory data, one value logged at every step.

With a step of half a millisecond almost everything is overhead: fetching the batch, the optimizer, and the loop around
the user's code. All contenders train the same model on the same `DataLoader`; a repetition runs each of them once.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from time import perf_counter

import pytorch_lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import raylight
from benchmarks.figures import Figure, show
from benchmarks.terminal import unseen_terminal

NUM_STEPS = 800
NUM_WARM_UP_STEPS = 100
NUM_REPETITIONS = 9
BATCH_SIZE = 32


class StepClock:
    """Called at the start of each training step; microseconds a step, the first hundred left out."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.start = self.stop = 0.0

    def tick(self) -> None:
        if self.num_steps == NUM_WARM_UP_STEPS:
            self.start = perf_counter()
        self.num_steps += 1
        if self.num_steps == NUM_STEPS:
            self.stop = perf_counter()

    @property
    def us_per_step(self) -> float:
        if self.num_steps != NUM_STEPS:
            raise RuntimeError(f"{self.num_steps} steps were made instead of {NUM_STEPS}")
        return (self.stop - self.start) / (NUM_STEPS - 1 - NUM_WARM_UP_STEPS) * 1e6


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def make_dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    num_samples = NUM_STEPS * BATCH_SIZE
    images = torch.randn(num_samples, 784, generator=generator)
    return TensorDataset(images, torch.randint(10, (num_samples,), generator=generator))


def run_raw(loader: DataLoader, clock: StepClock, writer: SummaryWriter | None = None) -> None:
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step, (images, labels) in enumerate(loader):
        clock.tick()
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        if writer is not None:
            writer.add_scalar("train_loss", loss.item(), step)


def run_raw_with_tensorboard(loader: DataLoader, clock: StepClock) -> None:
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        run_raw(loader, clock, writer)


def run_raw_with_batched_fetch(loader: DataLoader, clock: StepClock) -> None:
    """The loader gets whole lists of indices and takes each batch with one indexing call."""
    sampler = BatchSampler(RandomSampler(loader.dataset), BATCH_SIZE, drop_last=False)  # type: ignore[arg-type]
    run_raw(DataLoader(loader.dataset, sampler=sampler, batch_size=None), clock)


def module_class(parent: type) -> type:
    class Net(parent):  # type: ignore[misc]
        def __init__(self, clock: StepClock):
            super().__init__()
            self.net = make_net()
            self.tick = clock.tick

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.tick()
            images, labels = batch
            loss = F.cross_entropy(self.net(images), labels)
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    return Net


RaylightNet = module_class(raylight.Module)
LightningNet = module_class(pytorch_lightning.LightningModule)


def run_raylight(loader: DataLoader, clock: StepClock, bar: bool = True) -> None:
    with tempfile.TemporaryDirectory() as folder, unseen_terminal():
        raylight.fit(
            RaylightNet(clock), loader, num_workers=0, max_epochs=1, storage_path=folder,
            enable_progress_bar=bar, enable_model_summary=False, checkpoint=False,
        )  # fmt: skip


def run_lightning(loader: DataLoader, clock: StepClock, bar: bool = True) -> None:
    with tempfile.TemporaryDirectory() as folder, unseen_terminal():
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu", max_epochs=1, logger=pytorch_lightning.loggers.TensorBoardLogger(folder),
            enable_progress_bar=bar, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(LightningNet(clock), loader)


CONTENDERS: dict[str, Callable[[DataLoader, StepClock], None]] = {
    "raw loop": run_raw,
    "raw loop, TensorBoard at every step": run_raw_with_tensorboard,
    "raw loop, batched fetch": run_raw_with_batched_fetch,
    "raylight": run_raylight,
    "raylight, no progress bar": lambda loader, clock: run_raylight(loader, clock, bar=False),
    "Lightning": run_lightning,
    "Lightning, no progress bar": lambda loader, clock: run_lightning(loader, clock, bar=False),
}


def measure() -> list[Figure]:
    warnings.simplefilter("ignore")  # Lightning's advice on the number of loader processes
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    loader = DataLoader(make_dataset(), BATCH_SIZE, shuffle=True)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for repetition in range(NUM_REPETITIONS):
        print(f"small step: repetition {repetition + 1} of {NUM_REPETITIONS}", flush=True)
        for name, run in CONTENDERS.items():
            clock = StepClock()
            run(loader, clock)
            times[name].append(clock.us_per_step)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rivals = [Figure(name, value, "µs a step") for name, value in medians.items()]
    ratio = medians["raylight"] / medians["raw loop"]
    return [*rivals, Figure("raylight over raw loop", ratio, "times", at_most=0.9)]


if __name__ == "__main__":
    show("Small step (784-128-10, batch 32, a value logged at every step)", measure())
