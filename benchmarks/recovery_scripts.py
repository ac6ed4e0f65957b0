"""The scripts that benchmarks/recovery.py times: two workers, of which rank 1 is killed, or raises, after a while.

    python benchmarks/recovery_scripts.py raylight|raylight_cold|raylight_error|ray_train FILE
    torchrun --nproc-per-node 2 --max-restarts 1 benchmarks/recovery_scripts.py torchrun FILE

Each appends to FILE the time of day and the step of the failure ("killed"), and of the first step that rank 0 has
completed after it ("after"). The rivals save a checkpoint every ten steps, as their documentation shows.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

NUM_STEPS = 1_000_000
BATCH_SIZE = 32
KILL_AFTER_S = 20.0  # a standby is up by then
SAVE_EVERY = 10


def mark(path: str, event: str, step: int) -> None:
    with open(path, "a") as file:
        file.write(f"{event} {time.time()} {step}\n")


class Fault:
    """What each rank calls before and after a step; `after` says when the run may end."""

    def __init__(self, path: str, rank: int, kind: str = "kill"):
        self.path, self.rank, self.kind, self.began = path, rank, kind, time.monotonic()
        self.has_restarted = os.path.exists(f"{path}.killed")

    def before(self, step: int) -> None:
        if self.rank != 1 or self.has_restarted or time.monotonic() - self.began < KILL_AFTER_S:
            return
        if os.path.exists(f"{self.path}.killed"):
            return
        with open(f"{self.path}.killed", "w") as file:
            file.write(str(step))
        mark(self.path, "killed", step)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("user code is wrong")

    def after(self, step: int) -> bool:
        if not os.path.exists(f"{self.path}.killed"):
            return False
        with open(f"{self.path}.killed") as file:
            killed = int(file.read() or NUM_STEPS)
        if not self.has_restarted and step <= killed:
            return False
        if self.rank == 0:
            mark(self.path, "after", step)
        return True


def make_parts() -> tuple[Any, Any]:
    import torch
    from torch import nn

    net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    data = torch.utils.data.TensorDataset(torch.randn(64_000, 784), torch.randint(10, (64_000,)))
    return net, data


def train_raylight(path: str, kind: str = "kill", **arguments: Any) -> None:
    import torch
    from torch.nn import functional as F

    import raylight

    class Net(raylight.Module):
        def __init__(self, net: Any):
            super().__init__()
            self.net = net

        def on_train_start(self) -> None:
            self.fault = Fault(path, self.global_rank, kind)
            self.fault.has_restarted = self.fault.has_restarted and self.global_step == 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.fault.before(self.global_step)
            images, labels = batch
            return F.cross_entropy(self.net(images), labels)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.fault.after(self.global_step):
                self.trainer.should_stop = True

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    net, data = make_parts()
    loader = torch.utils.data.DataLoader(data, BATCH_SIZE, shuffle=True)
    try:
        raylight.fit(
            Net(net), loader, num_workers=2, use_gpu=False, max_epochs=1000, max_restarts=3 if kind == "kill" else 0,
            enable_progress_bar=False, **arguments,
        )  # fmt: skip
    except raylight.WorkerFailed:
        mark(path, "after", 0)


def train_by_hand(path: str, net: Any, data: Any, rank: int, restored: Any, save: Any) -> None:
    """The loop of both rivals: DDP, a checkpoint every ten steps."""
    import torch
    from torch.nn import functional as F

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    step = 0
    if restored is not None:
        net.load_state_dict(restored["net"])
        optimizer.load_state_dict(restored["optimizer"])
        step = restored["step"]
    fault = Fault(path, rank)
    sampler = torch.utils.data.DistributedSampler(data, 2, rank)
    for epoch in range(1000):
        sampler.set_epoch(epoch)
        for images, labels in torch.utils.data.DataLoader(data, BATCH_SIZE, sampler=sampler):
            fault.before(step)
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            step += 1
            if fault.after(step):
                return
            if step % SAVE_EVERY == 0:
                save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step})


def ray_train_loop(config: dict[str, Any]) -> None:
    import tempfile

    import torch
    from ray import train
    from ray.train.torch import prepare_model

    net, data = make_parts()
    net, rank = prepare_model(net), train.get_context().get_world_rank()
    checkpoint, restored = train.get_checkpoint(), None
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            restored = torch.load(f"{folder}/state.pt")

    def save(state: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0:
                torch.save(state, f"{folder}/state.pt")
                checkpoint = train.Checkpoint.from_directory(folder)
            train.report({"step": state["step"]}, checkpoint=checkpoint)

    train_by_hand(config["path"], net, data, rank, restored, save)


def train_ray_train(path: str) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    run_config = RunConfig(
        storage_path=os.path.abspath("ray_train"), failure_config=FailureConfig(max_failures=1),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
    )  # fmt: skip
    scale = ScalingConfig(num_workers=2)
    TorchTrainer(ray_train_loop, train_loop_config={"path": path}, scaling_config=scale, run_config=run_config).fit()


def train_torchrun(path: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    net, data = make_parts()
    restored = torch.load(f"{path}.state") if os.path.exists(f"{path}.state") else None

    def save(state: Any) -> None:
        if dist.get_rank() == 0:
            torch.save(state, f"{path}.state.new")
            os.replace(f"{path}.state.new", f"{path}.state")

    train_by_hand(path, torch.nn.parallel.DistributedDataParallel(net), data, dist.get_rank(), restored, save)


SCRIPTS = {
    "raylight": lambda path: train_raylight(path),
    "raylight_cold": lambda path: train_raylight(path, num_standby=0),
    "raylight_error": lambda path: train_raylight(path, kind="raise"),
    "ray_train": train_ray_train,
    "torchrun": train_torchrun,
}

if __name__ == "__main__":
    SCRIPTS[sys.argv[1]](os.path.abspath(sys.argv[2]))
