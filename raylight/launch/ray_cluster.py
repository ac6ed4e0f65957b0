"""The Ray cluster: joining one or starting one here, and what it has room for."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import state as ray_state

from raylight.contract.config import Config
from raylight.contract.errors import ClusterError, InvalidArguments, NotEnoughResources
from raylight.launch.lifeline import answers, end_process, hold_on_to
from raylight.launch.ray_local import LocalRay, silence

Resources = Mapping[str, float]

CONNECT_TIMEOUT_S = 5.0
NODE_GROUP = "ray.io/node-group"
TELL_AFTER_S = 5.0
GROWTH_PATIENCE_S = 30.0
"""The autoscaler looks every five seconds, and may have to give up one node that failed before it asks for another."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The resources of the connected cluster, in use or not."""

    num_nodes: int
    num_cpus: float
    num_gpus: float
    autoscales: bool
    """Whether it adds nodes on demand."""
    started_here: bool
    """Whether raylight started it, on this machine, for this process."""


# ---- connecting


def connect(config: Config | None = None) -> Cluster:
    """Uses the Ray that this process is connected to, else the one that RAY_ADDRESS names, else starts one here with
    as many logical CPUs as `config` asks for. A Ray that was started here ends with this process."""
    num_cpus = _cpus_wanted(config) if config is not None else 0
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        if address.startswith("ray://"):
            raise InvalidArguments(
                f"RAY_ADDRESS={address!r} is a Ray Client address, which cannot stream what workers say. Run the "
                "script on the cluster (`ray job submit -- python script.py`), or give the address of its head node."
            )
        if address == "local":
            _local.start(num_cpus, config.gpu_indices if config is not None else ())
        else:
            _join(address)
    elif ray.util.client.ray.is_connected():
        raise InvalidArguments(
            "this process is connected by Ray Client (ray://), which cannot stream what workers say. Run the script on "
            "the cluster, for example with `ray job submit`."
        )
    _note_environment()
    cluster = describe_cluster()
    assert cluster is not None
    return cluster


def _join(address: str) -> None:
    """Connects to a Ray that runs already. Raises ClusterError, with what to do, if that cannot be."""
    problem = _find_no_way(address)
    if problem:
        raise ClusterError(problem)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, OSError, ValueError) as error:
        text = str(error).strip()
        advice = "install the same versions here" if text.startswith("Version mismatch") else "see `ray status` there"
        raise ClusterError(f"cannot connect to the Ray cluster at RAY_ADDRESS={address}: {text}\n({advice})") from error
    silence()
    hold_on_to_head()


def _find_no_way(address: str) -> str:
    """Why no driver here can use the cluster at `address`, as far as a moment tells; Ray takes minutes to give up."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            return (
                f"nothing answers at RAY_ADDRESS={address} ({error}). Is the cluster up (`ray status` on its head)? "
                "Does a firewall let this machine through? To train on this machine alone, unset RAY_ADDRESS."
            )
    heads = _find_local_heads()
    if heads is None:
        return ""
    if not heads:
        return (
            f"this machine is no node of the Ray cluster at RAY_ADDRESS={address}, and only from a node can workers be "
            "directed. Run the script there: `ray dashboard cluster/….yaml &`, then `ray job submit --address "
            "http://localhost:8265 --working-dir . -- python script.py`; cluster/README.md has it step by step."
        )
    if port.isdigit() and not any(head.endswith(f":{port}") for head in heads):
        return (
            f"what answers at RAY_ADDRESS={address} is not the head of a Ray cluster that this machine is a node of. "
            f"The Ray that runs here belongs to {', '.join(sorted(heads))}."
        )
    return ""


def _find_local_heads() -> set[str] | None:
    """The heads of the Ray nodes on this machine, as `address:port`; None if there is no /proc to look at."""
    names = list(Path("/proc").glob("[0-9]*/comm"))
    raylets = [file.with_name("cmdline") for file in names if _read(file) == "raylet\n"]
    found = (re.search(r"--gcs-address=([^\0 ]+)", _read(file)) for file in raylets)
    return {match[1] for match in found if match} if names else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""  # the process has ended meanwhile


def describe_cluster() -> Cluster | None:
    """The resources of the connected cluster; None if this process is connected to none."""
    if not ray.is_initialized():
        return None
    nodes = node_resources()
    return Cluster(
        num_nodes=len(nodes),
        num_cpus=sum(node.get("CPU", 0.0) for node in nodes),
        num_gpus=sum(node.get("GPU", 0.0) for node in nodes),
        autoscales=_autoscales(),
        started_here=_local.is_running,
    )


def is_outgrown(config: Config) -> bool:
    """Whether a Ray that raylight started has fewer logical CPUs than `config` asks for, or other GPUs. That is only a
    setting, and another Ray can be started."""
    return ray.is_initialized() and not _local.fits(_cpus_wanted(config), config.gpu_indices)


def node_resources() -> list[dict[str, float]]:
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def is_node_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away soon (preemption, scaling down) and should not be relied on. None while
    the head does not answer: Ray's own question would then wait, and with it the driver, for many minutes."""
    if not answers(ray.get_runtime_context().gcs_address, timeout_s=1.0):
        return set()
    return set(ray_state.state.get_draining_nodes())


def _autoscales() -> bool:
    """Whether an autoscaler looks after the cluster: `ray up` and KubeRay name the group of each node that they start.
    Only it knows what it could add."""
    return not _local.is_running and any(NODE_GROUP in node.get("Labels", {}) for node in ray.nodes() if node["Alive"])


def _cpus_wanted(config: Config) -> int:
    workers = config.num_workers
    most = workers[1] if isinstance(workers, tuple) else workers if isinstance(workers, int) else 1
    return math.ceil(most * config.resources_per_worker.get("CPU", 1.0))


_local = LocalRay()


def disconnect() -> None:
    """Ends the Ray that raylight started, if it did; one that others started is left alone. Done at exit."""
    _local.stop()


atexit.register(disconnect)


def hold_on_to_head() -> None:
    """On a node other than the head: this process ends if the head is out of reach for long."""
    head = ray.get_runtime_context().gcs_address
    if head.rpartition(":")[0].strip("[]") != ray.util.get_node_ip_address():
        hold_on_to(head, lambda text: end_process(text) if _is_connected_to(head) else None)


def _is_connected_to(head: str) -> bool:
    """A process that has left a cluster does not end with it."""
    return ray.is_initialized() and ray.get_runtime_context().gcs_address == head


# ---- environment variables


_environment: dict[str, str] | None = None


def _note_environment() -> None:
    global _environment
    if _environment is None:
        _environment = dict(os.environ)


def changed_environment() -> dict[str, str | None]:
    """Variables that this process has set (None: deleted) since it connected, which Ray's processes cannot know."""
    before = _environment or {}
    changed: dict[str, str | None] = {name: value for name, value in os.environ.items() if before.get(name) != value}
    return changed | {name: None for name in before if name not in os.environ}


# ---- room


def count_fitting(nodes: Sequence[Resources], worker: Resources, strategy: str = "PACK") -> int:
    """How many workers that need `worker` each have room on `nodes`, under a placement group's strategy."""
    needs = {name: amount for name, amount in worker.items() if amount > 0}
    rooms = [
        min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items()), default=0) for node in nodes
    ]
    if strategy == "STRICT_PACK":
        return max(rooms, default=0)
    if strategy == "STRICT_SPREAD":
        return sum(room > 0 for room in rooms)
    return sum(rooms)


def check_room(cluster: Cluster, num_workers: int, worker: Resources, strategy: str = "PACK") -> None:
    """Raises NotEnoughResources if the cluster, even with nothing else on it, has no room for the workers."""
    if cluster.autoscales:
        return
    nodes = node_resources()
    fitting = count_fitting(nodes, worker, strategy)
    if fitting >= num_workers:
        return
    has = " + ".join(_describe(node, worker) for node in nodes) or "no node"
    fits = f"num_workers={fitting} would fit" if fitting else "not one of them would fit"
    if fitting == 0 and worker.get("GPU") and not cluster.num_gpus:
        fits = f"there are no GPUs; num_workers={num_workers}, use_gpu=False trains on CPUs"
    raise NotEnoughResources(
        f"asked for {num_workers} workers with {_describe(worker, worker)} each ({strategy}); the Ray cluster has "
        f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}: {has}. What fits: {fits}."
    )


def has_room_now(num_workers: int, worker: Resources) -> bool:
    """Whether that much is free on the cluster as a whole. Ray finds out whether there are nodes that it fits on."""
    free = ray.available_resources()
    return all(free.get(name, 0.0) >= amount * num_workers for name, amount in worker.items())


def describe_wait(num_workers: int, worker: Resources) -> str:
    """The text for a group that cannot be placed yet: what it waits for."""
    free = ray.available_resources()
    state = "others use the rest"
    if _autoscales():
        starting = count_starting_nodes()
        state = f"the cluster is starting {starting} more nodes" if starting else "the cluster may add nodes"
    return (
        f"waiting for room for {num_workers} workers with {_describe(worker, worker)} each: "
        f"{_describe({name: free.get(name, 0.0) for name in worker}, worker)} free now, {state}"
    )


class Growth:
    """Watches a cluster that has to add nodes before workers have room, and sees when it is not going to."""

    def __init__(self, num_workers: int, worker: Resources, strategy: str, clock: Callable[[], float] = time.monotonic):
        self._num_workers, self._worker, self._strategy = num_workers, worker, strategy
        self._clock = clock
        self._stalled_since: float | None = None

    def check(self) -> None:
        """Raises NotEnoughResources if nothing is in use that may become free, and the autoscaler, which has had
        time to see what is asked for, starts no node."""
        nodes = node_resources()
        fitting = count_fitting(nodes, self._worker, self._strategy)
        if fitting >= self._num_workers or self._is_in_use() or count_starting_nodes():
            self._stalled_since = None
            return
        now = self._clock()
        if self._stalled_since is None:
            self._stalled_since = now
        if now - self._stalled_since >= GROWTH_PATIENCE_S:
            raise NotEnoughResources(
                f"asked for {self._num_workers} workers with {_describe(self._worker, self._worker)} each "
                f"({self._strategy}); the Ray cluster has room for {fitting}, and its autoscaler has started no node "
                f"for {GROWTH_PATIENCE_S:g} s: it has none of that kind to add, or may add no more (max_workers in the "
                "cluster's file), or cannot (`ray status` says why)."
            )

    def _is_in_use(self) -> bool:
        free, there = ray.available_resources(), ray.cluster_resources()
        return any(free.get(name, 0.0) < there.get(name, 0.0) for name, amount in self._worker.items() if amount)


def count_starting_nodes() -> int:
    """Nodes that the autoscaler has asked for and that have not joined; Ray has two kinds of it."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    report_json = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)  # by the first kind
    if report_json:
        report = json.loads(report_json).get("autoscaler_report") or {}
        return len(report.get("pending_nodes") or []) + sum((report.get("pending_launches") or {}).values())
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return len(status.pending_nodes) + sum(launch.count for launch in status.pending_launches)


def _describe(resources: Resources, of: Resources) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in of)


def wait_for(
    is_ready: Callable[[float], bool], describe: Callable[[], str], tell: Callable[[str], object] | None
) -> None:
    """Until `is_ready(timeout_s)`. Says what it waits for, after a while and then once a minute."""
    tell_at = time.monotonic() + TELL_AFTER_S
    while not is_ready(1.0):
        if tell is not None and time.monotonic() >= tell_at:
            tell(describe())
            tell_at += 60.0
