"""Ray on hosts made of namespaces, started by hand: what tests of nodes and of what can be wrong with them begin with.

    with Network(folder) as network:
        cluster = RayHosts(network)
        cluster.add("head", cpus=0)
        cluster.add("one", cpus=1)
        cluster.start_ray("head", "one")
        driver = cluster.spawn("head", SCRIPT, "an", "argument")
        print(driver.finish())

Ray notices within seconds that a node is gone, which takes it more than a minute as it comes.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from tests.end_to_end.hosts import REPOSITORY, Host, Network, end, wait_until

RAY_OPTIONS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # how long a node looks for a head that is gone
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}
BIN = f"{sys.prefix}/bin"


class Driver:
    """A script that runs on a host."""

    def __init__(self, host: Host, command: str, variables: Mapping[str, str]):
        self.host = host
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (gone with this object)
        self._process: subprocess.Popen = host.spawn(command, self._output, **variables)

    def read(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def finish(self, timeout_s: float = 240, status: int = 0) -> str:
        """What it printed, once it has ended with `status`."""
        try:
            ended = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            ended = None
        end(self._process)
        printed = self.read()
        assert ended == status, f"ended with {ended}:\n{printed}"
        return printed

    def kill(self) -> None:
        end(self._process)


class RayHosts:
    """A head, which is the first host, and nodes. raylight is that of this repository, wherever it is installed."""

    def __init__(self, network: Network):
        self.network = network
        self.hosts: dict[str, Host] = {}
        self._variables: dict[str, Mapping[str, str]] = {}
        self._flags: dict[str, str] = {}
        self._addresses: dict[str, str] = {}

    @property
    def head(self) -> Host:
        return next(iter(self.hosts.values()))

    @property
    def address(self) -> str:
        """Of the cluster, for RAY_ADDRESS."""
        ip = self._addresses[self.head.name]
        return f"[{ip}]:6379" if ":" in ip else f"{ip}:6379"

    def add(self, name: str, cpus: int, flags: str = "", card: str = "", **variables: str) -> Host:
        """A host whose Ray, once it is started, has `cpus` for workers, and a resource of its own name. `flags` are of
        `ray start`, `variables` of the environment of all that runs there; `card` is the address of a second network
        card, which Ray is to use (as `192.0.2.1/24`)."""
        host = self.hosts[name] = self.network.add_host(name, max(1, cpus))
        self._addresses[name] = card.partition("/")[0] or host.address
        if card:
            host.add_card(card)
            flags += f" --node-ip-address={self._addresses[name]}"
        self._variables[name] = RAY_OPTIONS | {"PYTHONPATH": str(REPOSITORY)} | variables
        self._flags[name] = f"--num-cpus={cpus} --resources='{json.dumps({name: 1})}' {flags}"
        return self.hosts[name]

    def start_ray(self, *names: str) -> None:
        """On hosts that have none; the head first, the others at once."""
        starting = []
        for name in names:
            host = self.hosts[name]
            is_head = host is self.head
            where = "--head --port=6379 --include-dashboard=false" if is_head else f"--address={self.address}"
            # In a session of its own, since `end` kills all that is left of this one.
            command = (
                f"setsid --wait {BIN}/ray start {where} {self._flags[name]} --disable-usage-stats "
                "--object-store-memory=100000000"
            )
            starting.append(Driver(host, command, self._variables[name]))
            if is_head:
                starting.pop().finish()
        for one in starting:
            one.finish()

    def spawn(self, name: str, script: str, *arguments: str, **variables: str) -> Driver:
        """Runs a Python script, in the host's home, as a driver of the cluster."""
        host = self.hosts[name]
        file = host.home / "script.py"
        file.write_text(script)
        address = {"RAY_ADDRESS": self.address}
        command = shlex.join([f"{BIN}/python", "script.py", *arguments])
        return Driver(host, command, self._variables[name] | address | variables)

    def count_workers(self, name: str) -> int:
        """How many processes of raylight's workers a host runs."""
        listed = self.hosts[name].run("ps -e -o args")
        return sum("RankWorker" in line for line in listed.splitlines())

    def wait_for_nodes(self, count: int) -> None:
        """Until so many nodes live, as the head sees it."""
        program = "import ray; ray.init(log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"

        def is_so() -> bool:
            command = f"{BIN}/python -c {shlex.quote(program)} 2>/dev/null"
            counted = self.head.run(command, check=False, RAY_ADDRESS=self.address)
            return counted.strip().endswith(str(count))

        wait_until(is_so, 120, f"{count} nodes live")
