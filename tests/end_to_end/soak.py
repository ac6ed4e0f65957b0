"""Training under random failures of workers, driver and storage; a seed makes the same ones again.

    python -m tests.end_to_end.soak --seed 7 --steps 2000 --faults 60

prints how many faults the run survived, and ends with 1 where its weights, or the samples that it saw, are not those
of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import raylight as pl
from tests.faults import POINTS, FailAt
from tests.faults_storage import Fault, FaultProxy, s3_server

ROOT = Path(__file__).parents[2]
NUM_SAMPLES, BATCH_SIZE, NUM_WORKERS = 45, 4, 2
STEPS_PER_EPOCH = -(-NUM_SAMPLES // (BATCH_SIZE * NUM_WORKERS))
WORKER_KINDS = ("kill", "exit", "exception", "memory", "hang")
STORAGE_KINDS = ("500", "503", "reset", "dropped", "unanswered")


@dataclass(frozen=True)
class Plan:
    """What will happen, drawn from a seed."""

    workers: list[tuple[int, int, str, str]]  # rank, step, point, kind
    drivers: list[int]  # steps at which the driver is killed
    storage: list[tuple[str, int, int]]  # kind, first of the matching requests, how many


def draw_plan(seed: int, num_steps: int, num_faults: int) -> Plan:
    draw = random.Random(seed)
    steps = draw.sample(range(1, num_steps - 1), num_faults)
    num_drivers = max(1, num_faults // 6)
    workers = []
    for step in sorted(steps[num_drivers:]):
        kind = draw.choices(WORKER_KINDS, (8, 2, 3, 2, 1))[0]
        points = [point for point in POINTS if kind == "kill" or point in ("data", "forward", "backward")]
        workers.append((draw.randrange(NUM_WORKERS), step, draw.choice(points), kind))
    requests = draw.sample(range(1, 10 * num_steps), num_faults)
    storage = [(draw.choice(STORAGE_KINDS), first, draw.randint(1, 3)) for first in sorted(requests)]
    return Plan(workers, sorted(steps[:num_drivers]), storage)


class Net(pl.Module):
    """Dropout in each step: a random number that is lost or drawn twice shows in the weights."""

    def __init__(self, folder: str):
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
        self.folder = folder

    def training_step(self, batch, batch_idx):
        # Before the step counts: a rank may be killed when it does, and the step is not made again.
        with Path(self.folder, f"ids-{self.global_rank}").open("a") as file:
            file.write(json.dumps([self.current_epoch, self.global_step, batch[1].tolist()]) + "\n")
        loss = self.net(batch[0]).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).pow(2).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(folder: str, storage_path: str, num_steps: int, plan: Plan | None) -> None:
    """One life of the driver; ends with the weights of the whole run in `folder`."""
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(NUM_SAMPLES, 4, generator=generator), torch.arange(NUM_SAMPLES)
    )  # fmt: skip
    callbacks = []
    if plan is not None:
        callbacks = [FailAt(rank, step, point, kind, Path(folder)) for rank, step, point, kind in plan.workers]
        callbacks += [FailAt(0, step, "forward", "driver", Path(folder)) for step in plan.drivers]
    module = Net(folder)
    loader = torch.utils.data.DataLoader
    pl.fit(
        module, loader(data, BATCH_SIZE, shuffle=True), loader(data, 16), num_workers=NUM_WORKERS, use_gpu=False,
        seed=5, max_steps=num_steps, name="soak", storage_path=storage_path, resume="last", callbacks=callbacks,
        checkpoint={"every_n_steps": 5, "keep_last": 3}, max_restarts=1_000_000, hang_timeout_s=3.0,
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.save(module.state_dict(), f"{folder}/weights.pt")


def run_driver(folder: Path, storage_path: str, num_steps: int, seed: int, num_faults: int) -> int:
    arguments = [str(folder), storage_path, str(num_steps), str(seed), str(num_faults)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    with (folder / "output").open("a") as output:
        return subprocess.run(
            [sys.executable, "-m", "tests.end_to_end.soak", "--drive", *arguments], cwd=folder, env=environment,
            stdout=output, stderr=subprocess.STDOUT, timeout=3600,
        ).returncode  # fmt: skip


def seen_samples(folder: Path) -> dict[int, list[int]]:
    """By epoch; of a step that was made again after a loss, what it saw the last time."""
    by_step: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for rank in range(NUM_WORKERS):
        for line in (folder / f"ids-{rank}").read_text().splitlines():
            epoch, step, ids = json.loads(line)
            by_step[step, rank] = epoch, ids
    epochs: dict[int, list[int]] = {}
    for epoch, ids in by_step.values():
        epochs.setdefault(epoch, []).extend(ids)
    return {epoch: sorted(ids) for epoch, ids in epochs.items()}


def soak(folder: Path, seed: int, num_steps: int, num_faults: int) -> str:
    """Trains with and without faults and compares; returns the report. Raises AssertionError."""
    calm, rough = folder / "calm", folder / "rough"
    calm.mkdir()
    rough.mkdir()
    assert run_driver(calm, str(calm), num_steps, seed, 0) == 0, (calm / "output").read_text()
    plan = draw_plan(seed, num_steps, num_faults)
    num_deaths = 0
    with s3_server() as port:
        proxy = FaultProxy(port)
        proxy.faults += [Fault(kind, first, count) for kind, first, count in plan.storage]
        try:
            while code := run_driver(rough, proxy.uri("soak"), num_steps, seed, num_faults):
                assert code == -9, (rough / "output").read_text()[-6000:]
                num_deaths += 1
                assert num_deaths <= len(plan.drivers), "the driver died more often than it was killed"
            told = len(proxy.requests)
            num_storage = sum(max(0, min(count, told - first + 1)) for _, first, count in plan.storage)
        finally:
            proxy.close()
    expected, found = (torch.load(one / "weights.pt", weights_only=True) for one in (calm, rough))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} differs from the undisturbed run's"
    samples = seen_samples(rough)
    whole = num_steps // STEPS_PER_EPOCH
    for epoch in range(whole):
        assert samples[epoch] == list(range(NUM_SAMPLES)), f"epoch {epoch} saw other samples"
    num_workers = len([*rough.glob("*-*-*-*-0")]) - num_deaths
    return (
        f"seed {seed}: {num_steps} steps, survived {num_workers} faults of workers, {num_deaths} of the driver and "
        f"{num_storage} of storage; same weights, each sample once in each of {whole} epochs"
    )


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        folder, storage_path, num_steps, seed, num_faults = sys.argv[2:]
        plan = draw_plan(int(seed), int(num_steps), int(num_faults)) if int(num_faults) else None
        train(folder, storage_path, int(num_steps), plan)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--faults", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), options.seed, options.steps, options.faults))


if __name__ == "__main__":
    main()
