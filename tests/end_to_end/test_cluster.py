"""From `ray up` to `ray down` of cluster/on-prem.yaml, on hosts made of namespaces, as someone at a desk does it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.hosts import REPOSITORY, Host, Network, end, find_missing, wait_until
from tests.faults_storage import BUCKET, CREDENTIALS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WAIT_FOR_NODES = """
import sys, time, ray
ray.init(log_to_driver=False)
while len([node for node in ray.nodes() if node["Alive"]]) < int(sys.argv[1]):
    time.sleep(0.2)
print("nodes:", *sorted(node["NodeManagerHostname"] for node in ray.nodes()))
"""

ASK_FOR_JOBS = """
import http.client, sys
dashboard = http.client.HTTPConnection("127.0.0.1", 8265)
dashboard.request("GET", "/api/jobs/", headers={"Authorization": f"Bearer {token}" for token in sys.argv[1:]})
print(dashboard.getresponse().status)
"""

MAKE_BUCKET = f"""
import http.client
store = http.client.HTTPConnection("desk", 9000)
store.request("PUT", "/{BUCKET}")
assert store.getresponse().status == 200
"""


class OnPrem:
    """Three machines, and a desk that starts a cluster on them. raylight is installed on each already."""

    def __init__(self, network: Network):
        self.desk = network.add_host("desk")
        self.machines = [network.add_host(name) for name in ("head", "one", "two")]
        self.head = self.machines[0]
        for host in network.hosts.values():
            (host.home / "raylight-env").symlink_to(sys.prefix)
        (self.desk.home / "dist").mkdir()
        self._write_config(network.folder / "key")

    def at_desk(self, command: str, check: bool = True, timeout_s: float = 240, **variables: str) -> str:
        return self.desk.run(self._with_path(command), check, timeout_s, **variables)

    def open_tunnel(self) -> subprocess.Popen:
        tunnel = self.desk.spawn(self._with_path("exec ray dashboard on-prem.yaml"))
        wait_until(lambda: can_connect(self.desk, "localhost", 8265), 60, "`ray dashboard` opens a tunnel")
        return tunnel

    def submit(self, storage: str, **variables: str) -> str:
        """Submits examples/digits.py with a worker for each machine; what it printed."""
        environment = shlex.quote(json.dumps({"env_vars": variables}))
        job = shlex.join(["python", "digits.py", "--num-workers=3", "--max-epochs=2", f"--storage-path={storage}"])
        return self.at_desk(
            f"ray job submit --working-dir {REPOSITORY}/examples --runtime-env-json {environment} -- {job}",
            RAY_API_SERVER_ADDRESS=API,
        )

    def _with_path(self, command: str) -> str:
        return f"export PATH=~/raylight-env/bin:$PATH RAY_AUTH_MODE=token; {command}"

    def _write_config(self, key: Path) -> None:
        """cluster/on-prem.yaml with the lines filled in that it asks for."""
        config = yaml.safe_load((REPOSITORY / "cluster" / "on-prem.yaml").read_text())
        head, *workers = (machine.address for machine in self.machines)
        config["provider"] |= {"head_ip": head, "worker_ips": workers}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
        (self.desk.home / "on-prem.yaml").write_text(yaml.safe_dump(config))


API = "http://127.0.0.1:8265"


def can_connect(host: Host, name: str, port: int) -> bool:
    return "open" in host.run(f"timeout 5 bash -c '</dev/tcp/{name}/{port}' && echo open", check=False)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnPrem]:
    missing = find_missing()
    if missing is not None:
        pytest.skip(missing)
    with Network(tmp_path_factory.mktemp("network")) as network:
        cluster = OnPrem(network)
        cluster.at_desk("ray get-auth-token --generate")
        cluster.at_desk("ray up --yes on-prem.yaml")
        yield cluster


@pytest.fixture(scope="module")
def tunnel(cluster: OnPrem) -> Iterator[None]:
    process = cluster.open_tunnel()
    yield
    end(process)


@pytest.fixture(scope="module")
def object_store(cluster: OnPrem) -> Iterator[str]:
    """The URI of an empty prefix on an S3 server that runs at the desk."""
    desk = cluster.desk
    server = desk.spawn(f"{sys.executable} -m moto.server --host {desk.address} --port 9000")
    wait_until(lambda: can_connect(desk, "desk", 9000), 60, "the S3 server answers")
    desk.run(f"{sys.executable} -c {shlex.quote(MAKE_BUCKET)}")
    yield f"s3://{BUCKET}/runs?scheme=http&endpoint_override={desk.address}:9000&region=us-east-1"
    end(server)


def test_ray_up_starts_a_node_on_each_machine(cluster: OnPrem) -> None:
    (cluster.desk.home / "wait.py").write_text(WAIT_FOR_NODES)
    cluster.at_desk("ray rsync-up on-prem.yaml ~/wait.py ~/wait.py")
    assert "nodes: head one two" in cluster.at_desk("ray exec on-prem.yaml 'python wait.py 3'")
    # What `ray status` prints is a report that is made every few seconds.
    deadline = time.monotonic() + 60
    while "0.0/3.0 CPU" not in (status := cluster.at_desk("ray exec on-prem.yaml 'ray status'")):
        assert time.monotonic() < deadline, status


def test_dashboard_and_client_are_closed_to_the_network(cluster: OnPrem) -> None:
    listening = [line.split()[3] for line in cluster.head.run("ss -Hltn").splitlines()]
    assert "127.0.0.1:8265" in listening
    assert not [address for address in listening if address.endswith((":10001", ":8265")) and address[:3] != "127"]
    assert can_connect(cluster.desk, "head", 6379)
    assert not can_connect(cluster.desk, "head", 8265)


def test_nothing_is_served_without_the_token(cluster: OnPrem, tunnel: None) -> None:
    for token, answer in (("", "401"), ("guessed", "403"), ('"$(cat ~/.ray/auth_token)"', "200")):
        assert cluster.at_desk(f"python -c {shlex.quote(ASK_FOR_JOBS)} {token}") == f"{answer}\n"
    asked = f"ray status --address {cluster.head.address}:6379"
    assert "InvalidAuthToken" in cluster.at_desk(asked, check=False, RAY_AUTH_TOKEN="guessed")


@pytest.mark.soak
def test_job_trains_with_a_worker_on_each_machine(cluster: OnPrem, tunnel: None) -> None:
    output = cluster.submit("/mnt/runs")
    assert "Test accuracy" in output
    version = cluster.desk.network.shared / "runs" / "digits" / "version_0"
    assert json.loads((version / "run.json").read_text())["status"] == "finished"
    assert len(list(version.glob("logs/rank-*.log"))) == 3
    listed = cluster.at_desk("ray list actors --format json 2>/dev/null", RAY_API_SERVER_ADDRESS=API)
    workers = {actor["name"]: actor["node_id"] for actor in json.loads(listed) if ":rank" in actor["name"]}
    assert set(workers) == {f"raylight:digits:v0:rank{rank}" for rank in range(3)}
    assert len(set(workers.values())) == 3


def test_job_trains_on_object_storage(cluster: OnPrem, tunnel: None, object_store: str) -> None:
    assert "Test accuracy" in cluster.submit(object_store, **CREDENTIALS)
    read = f"import raylight; run = raylight.open_run({object_store!r}, 'digits'); print(run.status, run.last.step)"
    assert "finished 26" in cluster.at_desk(f"python -c {shlex.quote(read)}", **CREDENTIALS)


@pytest.mark.soak
def test_ray_down_and_ray_stop_leave_nothing(cluster: OnPrem) -> None:
    """`ray down` stops Ray on the head alone, so cluster/README.md has the workers stopped one by one."""
    cluster.at_desk("ray down --yes on-prem.yaml")
    for machine in cluster.machines[1:]:
        key = cluster.desk.network.folder / "key"
        options = f"-i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        cluster.at_desk(f"ssh {options} root@{machine.address} '~/raylight-env/bin/ray stop'")
    for machine in cluster.machines:
        left = machine.run("ps -e -o args")
        assert "ray" not in left.replace("sshd", ""), left
