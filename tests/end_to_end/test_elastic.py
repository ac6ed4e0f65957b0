"""Nodes are lost, announced as going, and added, while a run trains on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import scripts_in

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SCRIPT = """
import json, os, threading, time
import ray, torch
from ray.cluster_utils import Cluster
import raylight as pl

class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch):
        threading.Event().wait(0.02)
        return self.net(batch[0]).pow(2).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        "Says where this rank is, of how many; and ends the run when all that was to happen has happened."
        if batch_idx == 2:
            node = ray.get_runtime_context().get_node_id()
            open(f"step-{self.global_rank}-{self.trainer.world_size}-{node}", "w").close()
            if self.trainer.broadcast(os.path.exists("end")):
                self.trainer.should_stop = True

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

def wait_for(world_size, nodes=None):
    "Until all of so many ranks have made steps, on these nodes."
    while True:
        names = [name.split("-") for name in os.listdir(".") if name.startswith("step-")]
        found = {name[1]: name[3] for name in names if int(name[2]) == world_size}
        if len(found) == world_size and (nodes is None or set(found.values()) <= nodes):
            break
        time.sleep(0.05)
    for name in os.listdir("."):
        if name.startswith("step-"):
            os.remove(name)

def ids():
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

def act():
    try:
        change()
        mistakes.clear()
    finally:
        open("end", "w").close()
    threading.Event().wait()  # Ray's daemons end with the thread that has started them

mistakes = ["what was to happen has not, see stderr"]

def fit(**arguments):
    data = torch.utils.data.TensorDataset(torch.randn(40, 4))
    threading.Thread(target=act, daemon=True).start()
    result = pl.fit(
        Net(), torch.utils.data.DataLoader(data, batch_size=2), use_gpu=False, max_epochs=100_000, name="net",
        storage_path=os.path.abspath("runs"), enable_progress_bar=False, enable_model_summary=False, num_standby=0,
        global_batch_size=8, **arguments,
    )
    assert not mistakes, mistakes
    restarts = pl.open_run("runs").record.get("restarts", [])
    print(json.dumps({
        "worlds": [restart["world_size"] for restart in restarts],
        "reasons": [restart["reason"] for restart in restarts],
        "num_steps": result.num_steps, "num_restarts": result.num_restarts,
        "last": result.last_checkpoint.step, "lost": result.goodput["lost_work"],
    }), flush=True)

ray._private.utils.set_sigterm_handler = lambda handler: None  # so that a thread may add nodes
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
ray.init(cluster.address, log_to_driver=False)
first = ids()
second = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
"""
END = """
from raylight.launch import ray_actors
ray_actors.release_all()
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    with scripts_in(tmp_path) as start:

        def finish(text: str) -> dict[str, Any]:
            script = start(SCRIPT + text + END)
            lines = script.finish(errors=None).splitlines()  # the test's own nodes are not quiet
            script.assert_nothing_is_left(within_s=30)
            found: dict[str, Any] = json.loads(next(line for line in lines if line.startswith("{")))
            return found

        yield finish


@pytest.mark.soak
def test_a_lost_node_shrinks_an_elastic_run_and_a_new_one_lets_it_grow(run):
    found = run("""
def change():
    wait_for(2)
    cluster.remove_node(second, allow_graceful=False)
    wait_for(1)
    cluster.add_node(num_cpus=1)
    wait_for(2)

fit(num_workers=(1, 2), replacement_timeout_s=1.0)
""")
    assert found["worlds"] == [1, 2], found["reasons"]
    assert found["lost"] == 0.0
    assert found["last"] == found["num_steps"]


@pytest.mark.soak
def test_workers_move_off_a_node_before_it_is_taken_away(run):
    found = run("""
def change():
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    wait_for(2)
    [going] = ids() - first
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(going, preemption, "spot", int(time.time() * 1000) + 120_000)
    assert accepted, why
    cluster.add_node(num_cpus=1)
    while len(ids() - {going}) < 2:
        time.sleep(0.1)
    wait_for(2, ids() - {going})

fit(num_workers=2)
""")
    assert found["worlds"] == [2], found["reasons"]
    assert found["reasons"] == ["1 joined, 1 left with their nodes"]
    assert found["num_restarts"] == 0  # nothing failed
    assert found["lost"] == 0.0
