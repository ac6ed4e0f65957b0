"""Nodes are lost, cut off, and come back, in the middle of training; on hosts made of namespaces."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.end_to_end.hosts import Network, find_missing, wait_until
from tests.end_to_end.ray_hosts import Driver, RayHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_SAMPLES = 41
NUM_EPOCHS = 3

# Rank RANK stands still in front of its step STEP, once, and says on which host; it goes on when it is told.
SCRIPT = f"""
import os, socket, sys, time
from pathlib import Path
import numpy, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import raylight as pl

name, rank, step, resume = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
folder = Path("/mnt", name)
is_elastic = "ELASTIC" in os.environ


class HoldAt(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank != rank or trainer.global_step < step:
            return
        try:
            held = os.open(folder / "held", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(held, socket.gethostname().encode() + b"\\n")
        while not (folder / "go").exists():
            time.sleep(0.05)

    def on_train_epoch_end(self, trainer, module):
        if is_elastic and trainer.world_size == 2 and trainer.broadcast((folder / "shrunk").exists()):
            trainer.should_stop = True  # it has grown again


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        noise = float(numpy.random.uniform(-0.01, 0.01))
        loss = (self.net(batch[0]) + noise).pow(2).mean()
        self.log("loss", loss)
        self.ids = batch[1].tolist()
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with open(folder / f"ids-{{self.global_rank}}", "a") as file:
            file.write(f"{{self.current_epoch}} {{self.global_step}} {{self.ids}}\\n")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


generator = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn({NUM_SAMPLES}, 4, generator=generator), torch.arange({NUM_SAMPLES}))
folder.mkdir(exist_ok=True)
module = Net()
result = pl.fit(
    module, DataLoader(data, batch_size=4, shuffle=True), num_workers=(1, 2) if is_elastic else 2, use_gpu=False,
    seed=5, name=name, max_epochs=1_000_000 if is_elastic else {NUM_EPOCHS}, log_every_n_steps=1,
    storage_path="/mnt/runs", enable_progress_bar=False, enable_model_summary=False, callbacks=[HoldAt()],
    checkpoint=False if is_elastic else pl.Checkpointing(every_n_steps=2, keep_last=-1), resume=resume or None,
    replacement_timeout_s=1 if is_elastic else 300, num_standby=0,
)
torch.save(module.state_dict(), folder / "weights.pt")
print("ended:", result.status, result.num_steps, result.num_restarts)
"""


class Faults:
    """Runs of SCRIPT on a cluster of three nodes with room for one worker each."""

    def __init__(self, network: Network):
        self.cluster = RayHosts(network)
        self.cluster.add("head", cpus=0)
        for name in ("one", "two", "three"):
            self.cluster.add(name, cpus=1)
        self.cluster.start_ray(*self.cluster.hosts)
        self.shared = network.shared
        (self.shared / "runs").mkdir()

    def start(
        self, name: str, rank: int = -1, step: int = 0, resume: str = "", on: str = "head", **variables: str
    ) -> Driver:
        return self.cluster.spawn(on, SCRIPT, name, str(rank), str(step), resume, **variables)

    def wait_until_held(self, name: str) -> str:
        """The host of the rank that stands still."""
        file = self.shared / name / "held"
        wait_until(lambda: file.exists() and file.read_text().endswith("\n"), 120, f"{name} reaches its step")
        return file.read_text().strip()

    def release(self, name: str) -> None:
        (self.shared / name / "go").touch()

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return torch.load(self.shared / name / "weights.pt", weights_only=True)

    def version(self, name: str) -> Path:
        return self.shared / "runs" / name / "version_0"

    def boot(self, name: str) -> None:
        """A host that was killed, with a Ray that joins the cluster."""
        self.cluster.hosts[name].start()
        self.cluster.start_ray(name)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    missing = find_missing()
    if missing is not None:
        pytest.skip(missing)
    with Network(tmp_path_factory.mktemp("network")) as network:
        yield Faults(network)


@pytest.fixture(scope="module")
def undisturbed(faults: Faults) -> dict[str, torch.Tensor]:
    assert "ended: finished 18 0" in faults.start("undisturbed").finish()
    return faults.weights("undisturbed")


def assert_as_undisturbed(faults: Faults, name: str, undisturbed: dict[str, torch.Tensor]) -> None:
    """The same weights bit for bit, each sample once in each epoch, and checkpoints that are whole."""
    for key, tensor in faults.weights(name).items():
        assert torch.equal(tensor, undisturbed[key]), key
    lines = [line.split(" ", 2) for file in (faults.shared / name).glob("ids-*") for line in file.open()]
    by_step = {(epoch, step, ids): json.loads(ids) for epoch, step, ids in lines}  # a step that was made again
    seen = Counter((epoch, sample) for (epoch, _, _), ids in by_step.items() for sample in ids)
    assert seen == Counter((str(epoch), sample) for epoch in range(NUM_EPOCHS) for sample in range(NUM_SAMPLES))
    from raylight.storage.checkpoints import list_checkpoints, verify
    from raylight.storage.filesystem import Storage

    checkpoints = list_checkpoints(Storage(faults.version(name)))
    assert checkpoints[-1].step == 18
    for checkpoint in checkpoints:
        verify(checkpoint)


@pytest.mark.soak
def test_a_host_is_lost_and_the_spare_one_takes_its_place(faults: Faults, undisturbed) -> None:
    driver = faults.start("lost", rank=1, step=7)
    victim = faults.wait_until_held("lost")
    faults.cluster.hosts[victim].kill()
    assert "ended: finished 18 1" in driver.finish()
    assert_as_undisturbed(faults, "lost", undisturbed)
    faults.boot(victim)


@pytest.mark.soak
def test_a_host_is_lost_and_comes_back_where_there_is_no_spare_one(faults: Faults, undisturbed) -> None:
    # One after the other: while Ray has not noticed that a node is gone, it waits for that node's answer for minutes.
    faults.cluster.hosts["three"].kill()
    faults.cluster.wait_for_nodes(3)
    driver = faults.start("back", rank=0, step=5)
    victim = faults.wait_until_held("back")
    faults.cluster.hosts[victim].kill()
    wait_until(lambda: "failed at step" in driver.read(), 60, "the driver notices the loss")
    faults.boot(victim)
    assert "ended: finished 18 1" in driver.finish()
    assert_as_undisturbed(faults, "back", undisturbed)
    faults.boot("three")


@pytest.mark.soak
def test_a_host_that_comes_back_makes_an_elastic_run_grow(faults: Faults) -> None:
    faults.cluster.wait_for_nodes(4)
    faults.cluster.hosts["three"].kill()
    faults.cluster.wait_for_nodes(3)
    driver = faults.start("elastic", rank=1, step=7, ELASTIC="1")
    victim = faults.wait_until_held("elastic")
    faults.cluster.hosts[victim].kill()
    wait_until(lambda: "training goes on with 1, and takes on more" in driver.read(), 120, "the run shrinks")
    (faults.shared / "elastic" / "shrunk").touch()
    faults.boot(victim)
    assert "training goes on with 2 workers: 1 joined" in driver.finish()
    faults.boot("three")


@pytest.mark.soak
def test_a_host_is_cut_off_and_its_worker_stops_by_itself(faults: Faults, undisturbed) -> None:
    faults.cluster.wait_for_nodes(4)
    driver = faults.start("cut", rank=1, step=7)
    victim = faults.wait_until_held("cut")
    faults.cluster.hosts[victim].cut()
    faults.release("cut")
    assert faults.cluster.count_workers(victim) > 0
    assert "ended: finished 18 1" in driver.finish()
    assert_as_undisturbed(faults, "cut", undisturbed)
    wait_until(lambda: faults.cluster.count_workers(victim) == 0, 60, "the worker that was cut off ends")
    faults.cluster.hosts[victim].kill()
    faults.boot(victim)


@pytest.mark.soak
def test_a_driver_that_was_cut_off_commits_nothing_once_the_run_was_taken_up_elsewhere(
    faults: Faults, undisturbed
) -> None:
    """Storage is still within its reach, as it may be on a network of its own."""
    faults.cluster.wait_for_nodes(4)
    island = faults.cluster.add("island", cpus=2, RAY_gcs_rpc_server_reconnect_timeout_s="600")
    faults.cluster.start_ray("island")
    stale = faults.start("taken", rank=1, step=7, on="island")
    assert faults.wait_until_held("taken") == "island"
    island.cut()
    successor = faults.start("taken", resume="last")
    assert "ended: finished 18 0" in successor.finish()
    record = (faults.version("taken") / "run.json").read_text()
    faults.release("taken")
    wait_until(lambda: "attempt 1 has taken over" in stale.read(), 120, "the driver that was cut off notices")
    assert (faults.version("taken") / "run.json").read_text() == record
    assert_as_undisturbed(faults, "taken", undisturbed)
    stale.kill()
    island.kill()


@pytest.mark.soak
def test_the_head_is_restarted_and_the_run_goes_on_where_it_was(faults: Faults, undisturbed) -> None:
    driver = faults.start("head", rank=0, step=9)
    faults.wait_until_held("head")
    manifests = faults.version("head") / "checkpoints"
    wait_until(lambda: bool(list(manifests.glob("*/manifest.json"))), 30, "a checkpoint is there")
    faults.cluster.head.kill()
    driver.kill()
    for name in ("one", "two", "three"):
        wait_until(lambda name=name: faults.cluster.count_workers(name) == 0, 60, f"the workers on {name} end")
    faults.cluster.head.start()
    faults.cluster.start_ray("head", "one", "two", "three")
    assert "ended: finished 18 0" in faults.start("head", resume="last").finish()
    assert_as_undisturbed(faults, "head", undisturbed)
