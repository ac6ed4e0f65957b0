"""Nodes on which a run cannot work, and drivers that cannot reach one: one clear error, before user code runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.hosts import REPOSITORY, Network, find_missing
from tests.end_to_end.ray_hosts import RayHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# One fit on each of the nodes that are named, from one driver; on the last a GPU is asked for.
SCRIPT = """
import sys
from pathlib import Path
import torch
import raylight as pl

class Net(pl.Module):
    def prepare_data(self):
        Path("/mnt/user-code-ran").touch()
    def training_step(self, batch):
        return batch[0].sum()
    def configure_optimizers(self):
        return None

for name in sys.argv[1:]:
    try:
        pl.fit(
            Net(), [torch.zeros(1)], num_workers=1, use_gpu=name == "device", resources_per_worker={name: 1}, name=name,
            storage_path="/mnt/runs", enable_progress_bar=False, max_restarts=0,
        )
    except pl.RaylightError as error:
        print(f"<{name}> {type(error).__name__}: {error}", flush=True)
"""

ONLY_CONNECT = """
import raylight as pl
from raylight.contract.config import Config
from raylight.launch import ray_actors
try:
    print(ray_actors.connect(Config(num_workers=1)))
except pl.RaylightError as error:
    print(f"{type(error).__name__}: {error}")
"""

LATE = "import time\nnow = time.time\ntime.time = lambda: now() + 3600\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """A head, and nodes that are each wrong in one way."""
    missing = find_missing()
    if missing is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("network")
    with Network(folder) as network:
        cluster = RayHosts(network)
        cluster.add("head", cpus=1)
        shared = network.shared
        (shared / "old" / "torch-1.0.dist-info").mkdir(parents=True)
        (shared / "old" / "torch-1.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 1.0\n")
        (shared / "late").mkdir()
        (shared / "late" / "sitecustomize.py").write_text(LATE)
        cluster.add("old", cpus=1, PYTHONPATH=f"/mnt/old:{REPOSITORY}")
        cluster.add("late", cpus=1, PYTHONPATH=f"/mnt/late:{REPOSITORY}")
        cluster.add("device", cpus=1, flags="--num-gpus=1")
        bare = cluster.add("bare", cpus=1, PYTHONPATH="")
        for file in Path(sys.prefix).glob(
            "lib/python*/site-packages/*raylight*"
        ):  # how it was installed, editable or not
            cover = "mount -t tmpfs tmpfs" if file.is_dir() else "mount --bind /dev/null"
            bare.run(f"{cover} '{file}'")
        cluster.add("apart", cpus=1).run("mount -t tmpfs tmpfs /mnt")
        cluster.start_ray(*cluster.hosts)
        yield cluster


def test_nodes_that_a_run_cannot_use_are_named_with_what_to_do(cluster: RayHosts) -> None:
    names = ("bare", "old", "late", "apart", "device")
    printed = cluster.spawn("head", SCRIPT, *names).finish()
    said = dict(part.split("> ", 1) for part in printed.split("<")[1:])
    address = {name: f"{name} ({cluster.hosts[name].address})" for name in names}
    assert said["bare"].startswith("ClusterError: raylight cannot be imported on node " + cluster.hosts["bare"].address)
    assert "No module named 'raylight'" in said["bare"]
    assert (
        f"ClusterError: the nodes of the Ray cluster cannot work together:\n  - {address['old']} has torch 1.0, and"
        in (said["old"])
    )
    assert f"the clock of {address['late']} is 36" in said["late"]
    assert "ahead of the driver's: have it set by NTP" in said["late"]
    assert said["apart"].startswith("StorageError: storage_path is not one place for all nodes")
    assert f"{address['apart']}: no run.json is there" in said["apart"]
    assert said["device"].startswith("NotEnoughResources: Ray has given this worker a GPU of device, and torch")
    assert not (cluster.network.shared / "user-code-ran").exists()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("{head}:6379", "ClusterError: this machine is no node of the Ray cluster"),
        ("{head}:6380", "ClusterError: nothing answers at RAY_ADDRESS="),
        ("nowhere:6379", "ClusterError: nothing answers at RAY_ADDRESS=nowhere:6379"),
    ],
)
def test_a_driver_on_a_machine_outside_the_cluster_is_told_where_to_run(
    address: str, says: str, cluster: RayHosts
) -> None:
    desk = cluster.hosts.get("desk") or cluster.add("desk", cpus=1)
    address = address.format(head=cluster.head.address)
    assert cluster.spawn(desk.name, ONLY_CONNECT, RAY_ADDRESS=address).finish().startswith(says)


def test_a_port_that_another_program_has(cluster: RayHosts) -> None:
    """sshd's, on a node. Ray itself ends the process there, after a minute."""
    address = f"{cluster.head.address}:22"
    printed = cluster.spawn("head", ONLY_CONNECT, RAY_ADDRESS=address).finish()
    assert printed.startswith(f"ClusterError: what answers at RAY_ADDRESS={address} is not the head of a Ray cluster")
    assert f"belongs to {cluster.head.address}:6379" in printed
