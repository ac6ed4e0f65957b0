"""The process group: how the ranks of a generation find each other, leave each other, and meet anew."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import re
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from raylight.contract.task import Place

Endpoint = tuple[str, int]
Address = tuple[Any, ...]
"""Of a socket: host, port, and what its family adds."""

CONNECT_TIMEOUT_S = 30.0
"""For what `abort` cannot break: opening connections, once all ranks are known to be there."""

_PEER_LOSS = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Broken pipe|Connection refused|Socket (closed|Timeout)"
    r"|Connection was likely closed|recvValue failed|sendBytes failed|failed to (recv|send), got"
    r"|Timed out waiting \d+ms for (recv|send) operation|Application timeout caused pair closure"
    r"|remote process exited|ncclRemoteError|ncclSystemError|ncclInternalError|NCCL communicator was aborted"
    r"|ncclCommAbort|Watchdog caught collective operation timeout"
    r"|wait timeout after \d+ms, keys"
)


@dataclass(slots=True)
class _Membership:
    """What this process has to undo, and what `abort` has to cut."""

    backend: str
    timeout_s: float
    store: dist.Store
    listeners_before: set[Endpoint]
    endpoints: set[Endpoint]
    environment: dict[str, str | None] = field(default_factory=dict)


_opened: dict[int, dist.TCPStore] = {}
_membership: _Membership | None = None
_aborted_generation = -1


def open_store(host: str) -> tuple[dist.TCPStore, int]:
    """The rendezvous store that rank 0 hosts, on a port that the system chooses; call it before any rank joins.

    It listens on `host` alone; left to itself it would do so on all addresses. Stores of earlier generations are
    closed, so one process hosts one store at a time.
    """
    with _listen(host) as listener:
        port, fd = listener.getsockname()[1], os.dup(listener.fileno())
        if _membership is not None:  # an abort of the group that is left is not to cut the next one's store
            _membership.listeners_before.add(_endpoint(listener.getsockname()))
    store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
    _opened.clear()
    _opened[store.port] = store
    return store, store.port


def _listen(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
    except OSError:  # the node is known by an address that is not its own, as behind a translation of addresses
        return socket.create_server(("", 0), family=family, backlog=socket.SOMAXCONN)


def join(place: Place, backend: str | None = None, timeout_s: float = 1800.0) -> None:
    """Makes the default group of `place.generation`. `backend` None: NCCL on GPUs, gloo on CPUs.

    On GPUs the group has gloo too, for tensors that are on the CPU. `timeout_s` is that of a collective.
    Raises torch.distributed's errors where a rank does not come.
    """
    global _membership
    backend = _resolve_backend(backend, place.device)
    environment = _set_environment(place, backend)
    listeners = set(_listeners())
    store = _connect_store(place)
    endpoints = {(_resolve(place.store_host)[1][0], place.store_port)}
    _membership = _Membership(backend, timeout_s, store, listeners, endpoints, environment)
    if place.generation <= _aborted_generation:
        leave()
        raise RuntimeError("Connection closed by peer: this generation of the group was aborted before it was joined")
    prefixed = dist.PrefixStore(f"generation-{place.generation}", store)
    _meet(prefixed, place, "arrived", "", timeout_s)
    connect_timeout = timedelta(seconds=CONNECT_TIMEOUT_S + 0.1 * place.world_size)
    dist.init_process_group(
        backend, store=prefixed, rank=place.rank, world_size=place.world_size, timeout=connect_timeout
    )
    # Where gloo listens tells the group's connections from all others, which is what `abort` has to know.
    mine = set(_listeners()) - listeners
    for told in _meet(prefixed, place, "listens", "\n".join(f"{host} {port}" for host, port in mine), timeout_s):
        endpoints.update(_parse_endpoint(line) for line in told.splitlines())
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # its name before torch 2.14
    set_timeout(timedelta(seconds=timeout_s))


def leave() -> None:
    """Leaves the group that was joined here, if there is one. To the other ranks it looks as if this process had ended:
    what they wait for breaks at once.

    Without that, a rank that raised would leave its peers in their collective for as long as its DDP module lives,
    because that keeps the connections open.
    """
    global _membership
    if _membership is None:
        return
    abort()
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in _membership.environment.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    _membership = None


def rebuild(place: Place) -> None:
    """Leaves the broken group, and joins that of the next generation with the same backend and timeout."""
    if _membership is None:
        raise RuntimeError("rebuild needs a group that was joined before")
    backend, timeout_s = _membership.backend, _membership.timeout_s
    leave()
    join(place, backend, timeout_s)


def abort(generation: int = -1) -> None:
    """Breaks every collective that this process is in, from any thread; does nothing where there is no group.

    A `join` of `generation` that comes later fails at once. NCCL has an abort of its own. Gloo's does nothing, and so
    its connections are cut: the blocked call then raises "Connection closed by peer" here and on the other ranks.
    """
    global _aborted_generation
    _aborted_generation = max(_aborted_generation, generation)
    membership = _membership
    if membership is None:
        return
    if "nccl" in membership.backend:
        for group in list(distributed_c10d._world.pg_map):
            group.abort()
    endpoints = membership.endpoints | (set(_listeners()) - membership.listeners_before)
    for connection in _sockets():
        try:
            ends = {_endpoint(connection.getsockname()), _endpoint(connection.getpeername())}
            if ends & endpoints:
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # it listens, or was closed meanwhile: nobody waits on it


def is_peer_loss(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, is what a collective raises when another rank is gone.

    Texts as seen in torch 2.14 when a peer is killed; NCCL's as in its sources.
    """
    while error is not None:
        if isinstance(error, (RuntimeError, OSError)) and _PEER_LOSS.search(str(error)):
            return True
        error = error.__cause__
    return False


def _resolve_backend(backend: str | None, device: str) -> str:
    on_gpu = device.startswith("cuda")
    backend = backend or ("nccl" if on_gpu else "gloo")
    return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend


def _set_environment(place: Place, backend: str) -> dict[str, str | None]:
    """The variables that torchrun sets and libraries read, and the network interface. Returns what was there before."""
    wanted = {
        "MASTER_ADDR": place.store_host,
        "MASTER_PORT": str(place.store_port),
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "GROUP_RANK": str(place.node_rank),
        "NODE_RANK": str(place.node_rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
    }
    interface = find_interface(place.store_host)
    if interface is not None:
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if "nccl" in backend else ("GLOO_SOCKET_IFNAME",)
        wanted |= {name: interface for name in names if name not in os.environ}
    if "nccl" in backend and "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ:
        # Else NCCL's watchdog ends the process, and with it what the survivors are to keep. The driver aborts instead.
        wanted["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    return before


def find_interface(host: str) -> str | None:
    """The network interface of this machine that leads to `host`, an address or a name; None where unknown."""
    try:
        family, address = _resolve(host)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # chooses a route, sends nothing
            mine = probe.getsockname()[0]
            if family == socket.AF_INET6:
                return _interfaces_of_ipv6().get(ipaddress.ip_address(mine))
            for _, name in socket.if_nameindex():
                if _interface_address(probe, name) == mine:
                    return name
    except OSError:
        return None
    return None


def _resolve(host: str) -> tuple[socket.AddressFamily, Address]:
    """The family and address of a host, with a port that nobody connects to."""
    found = socket.getaddrinfo(host, 9, type=socket.SOCK_STREAM)[0]
    return found[0], found[4]


def _interfaces_of_ipv6() -> dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    """Linux alone tells; elsewhere gloo chooses by itself."""
    try:
        with open("/proc/net/if_inet6") as file:
            fields = [line.split() for line in file]
    except FileNotFoundError:
        return {}
    return {ipaddress.ip_address(bytes.fromhex(field[0])): field[5] for field in fields}


def _interface_address(any_socket: socket.socket, name: str) -> str | None:
    get_address = 0x8915  # SIOCGIFADDR
    try:
        answer = fcntl.ioctl(any_socket.fileno(), get_address, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return None  # an interface without an IPv4 address
    return socket.inet_ntoa(answer[20:24])


def _connect_store(place: Place) -> dist.Store:
    if place.world_size == 1:
        return dist.HashStore()
    if place.rank == 0 and place.store_port in _opened:
        return _opened[place.store_port]
    timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
    return dist.TCPStore(place.store_host, place.store_port, is_master=False, wait_for_workers=False, timeout=timeout)


def _meet(store: dist.Store, place: Place, topic: str, text: str, timeout_s: float) -> list[str]:
    """What every rank has to say on `topic`, once all have said it. `abort` breaks the wait."""
    store.set(f"{topic}-{place.rank}", text)
    keys = [f"{topic}-{rank}" for rank in range(place.world_size)]
    store.wait(keys, timedelta(seconds=timeout_s))
    return [value.decode() for value in store.multi_get(keys)]


def _listeners() -> Iterator[Endpoint]:
    for connection in _sockets():
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            yield _endpoint(connection.getsockname())


def _sockets() -> Iterator[socket.socket]:
    """Every TCP socket of this process, as a duplicate that is closed when the loop goes on."""
    for name in os.listdir("/dev/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed by another thread since it was listed
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                yield connection


def _endpoint(address: Address) -> Endpoint:
    return address[0].removeprefix("::ffff:"), address[1]


def _parse_endpoint(text: str) -> Endpoint:
    host, port = text.split()
    return host, int(port)
