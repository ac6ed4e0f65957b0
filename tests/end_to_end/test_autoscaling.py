"""A cluster that adds nodes on demand: Ray's own autoscaler, whose nodes are processes of one host of namespaces."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.autoscaler._private import fake_multi_node

from tests.end_to_end.hosts import Network, find_missing
from tests.end_to_end.ray_hosts import RayHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
CONFIG = {
    "cluster_name": "fake",
    "max_workers": 2,
    "idle_timeout_minutes": 5,
    "upscaling_speed": 1.0,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": HEAD_ID,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    "auth": {},
    "docker": {},
    **{f"{kind}setup_commands": [] for kind in ("", "head_", "worker_")},
    **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
    **{name: [] for name in ("initialization_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
}

# What never fits is asked for last: until then nothing else may be in use.
SCRIPT = """
import torch
import raylight as pl
from raylight.launch import ray_actors, ray_cluster

class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch):
        return self.layer(batch[0]).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def fit(num_workers):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 2)), batch_size=2)
    return pl.fit(
        Net(), data, num_workers=num_workers, use_gpu=False, max_epochs=1, enable_progress_bar=False,
        enable_model_summary=False, storage_path="/mnt/runs", strategy=pl.DDP(placement="SPREAD"),
    )

ray_cluster.GROWTH_PATIENCE_S = 10.0
ray_cluster.TELL_AFTER_S = 0.0  # nodes may come within its five seconds
print("trained:", fit(2).status, flush=True)
try:
    fit(3)
except pl.NotEnoughResources as error:
    print("refused:", error)
"""


@pytest.fixture(
    params=[
        pytest.param("1", id="second", marks=pytest.mark.soak),
        pytest.param("0", id="first", marks=pytest.mark.soak),
    ],
)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """With each of the two kinds of autoscaler that Ray has."""
    missing = find_missing()
    if missing is not None:
        pytest.skip(missing)
    with Network(tmp_path_factory.mktemp("network")) as network:
        cluster = RayHosts(network)
        head = cluster.add(
            "head",
            cpus=0,
            flags="--autoscaling-config=autoscaling.json",
            RAY_FAKE_CLUSTER="1",
            RAY_enable_autoscaler_v2=request.param,
            RAY_CLOUD_INSTANCE_ID=HEAD_ID,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
            RAY_NODE_TYPE_NAME="ray.head.default",  # as `ray up` sets it
            AUTOSCALER_UPDATE_INTERVAL_S="1",
        )
        (head.home / "autoscaling.json").write_text(json.dumps(CONFIG))
        # Ray looks for the defaults of this provider in a file that its wheel does not have.
        provider = Path(fake_multi_node.__file__).parent
        head.run(f"cp -r {provider} /run/provider && cp autoscaling.json /run/provider/example.yaml")
        head.run(f"mount --bind /run/provider {provider}")
        cluster.start_ray("head")
        yield cluster


def test_a_run_asks_for_the_nodes_it_lacks_and_starts_when_they_are_there(cluster: RayHosts) -> None:
    printed = cluster.spawn("head", SCRIPT).finish()
    assert re.search(r"waiting for room for 2 workers with 1 CPU each: [01] CPU free now, the cluster ", printed)
    assert "trained: finished" in printed
    refused = printed.partition("refused: ")[2]
    assert refused.startswith("asked for 3 workers with 1 CPU each (SPREAD); the Ray cluster has room for 2, and its ")
