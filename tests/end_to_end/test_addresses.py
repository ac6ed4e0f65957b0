"""Where ranks are and by which addresses they meet: several a node, several nodes, a head without any, two networks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.end_to_end.hosts import Network, find_missing
from tests.end_to_end.ray_hosts import RayHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = """
import json, os, socket
from pathlib import Path
import torch
import raylight as pl
from raylight.worker.group import process_group

class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def prepare_data(self):
        with open("/mnt/prepared", "a") as file:
            file.write(socket.gethostname() + "\\n")

    def training_step(self, batch):
        return self.layer(batch[0]).sum()

    def on_train_start(self):
        trainer = self.trainer
        Path("/mnt", f"rank-{trainer.global_rank}").write_text(json.dumps({
            "host": socket.gethostname(), "local_rank": trainer.local_rank, "node_rank": trainer.node_rank,
            "num_nodes": trainer.num_nodes, "world_size": trainer.world_size,
            "environment": [os.environ[name] for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "LOCAL_WORLD_SIZE")],
            "interface": os.environ["GLOO_SOCKET_IFNAME"],
            "listens": sorted({host for host, _ in process_group._listeners()}),
        }))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 2)), batch_size=2)
result = pl.fit(
    Net(), data, num_workers=4, use_gpu=False, max_epochs=1, enable_progress_bar=False, enable_model_summary=False,
    storage_path="/mnt/runs",
)
print("trained:", result.status, result.num_steps)
"""


def has_ipv6() -> bool:
    return os.path.exists("/proc/net/if_inet6")


@pytest.mark.parametrize(
    ("subnet", "is_only"),
    [
        pytest.param("10.214.7.{}/24", False, id="two networks", marks=pytest.mark.soak),
        pytest.param("fd07::{}/64", True, id="IPv6 alone", marks=pytest.mark.soak),
    ],
)
def test_ranks_of_two_nodes_and_a_head_without_workers(subnet: str, is_only: bool, tmp_path: Path) -> None:
    """Ray uses the second network; the first one is there too, or down."""
    missing = find_missing()
    if missing is not None:
        pytest.skip(missing)
    if ":" in subnet and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with Network(tmp_path / "network") as network:
        cluster = RayHosts(network)
        for number, (name, cpus) in enumerate({"head": 0, "one": 2, "two": 2}.items(), start=1):
            host = cluster.add(name, cpus, card=subnet.format(number))
            if is_only:
                host.run("ip link set eth0 down && ip -6 route add default via fd07::ffff dev eth1")
        cluster.start_ray(*cluster.hosts)
        assert "trained: finished 2" in cluster.spawn("head", SCRIPT).finish()
        ranks = [json.loads((network.shared / f"rank-{rank}").read_text()) for rank in range(4)]
        prepared = (network.shared / "prepared").read_text().split()
    assert [rank["host"] for rank in ranks] in (["one", "one", "two", "two"], ["two", "two", "one", "one"])
    assert [(rank["node_rank"], rank["local_rank"]) for rank in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all((rank["world_size"], rank["num_nodes"]) == (4, 2) for rank in ranks)
    assert [rank["environment"] for rank in ranks] == [[str(i), str(i % 2), str(i // 2), "2"] for i in range(4)]
    assert sorted(prepared) == ["one", "two"]  # once a node
    assert {rank["interface"] for rank in ranks} == {"eth1"}
    listens = {host for rank in ranks for host in rank["listens"]}
    assert {host for host in listens if host.startswith(subnet.partition("{")[0])}
    assert not [host for host in listens if host.startswith("10.213.")]
