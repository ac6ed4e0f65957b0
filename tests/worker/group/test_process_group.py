"""Real gloo between real processes; a rank dies by SIGKILL, raises, or hangs at a named point."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raylight.contract.task import Place
from raylight.worker.group import process_group

WORLD_SIZE = 3
# Ranks are forked from a server that has torch imported, and so begin in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed"])


class Ranks:
    """`WORLD_SIZE` processes that run `work(place, tell, *arguments)`; what they tell arrives in `heard`."""

    def __init__(self, work: Callable[..., None], *arguments: Any):
        self.store, port = process_group.open_store("127.0.0.1")
        place = Place(world_size=WORLD_SIZE, local_world_size=WORLD_SIZE, store_port=port)
        self._queue: Any = PROCESSES.Queue()
        self.processes = [
            PROCESSES.Process(
                target=_run, args=(work, replace(place, rank=rank, local_rank=rank), self._queue, arguments)
            )
            for rank in range(WORLD_SIZE)
        ]
        self.heard: dict[tuple[int, str], Any] = {}
        for process in self.processes:
            process.start()

    def hear(self, rank: int, topic: str) -> Any:
        while (rank, topic) not in self.heard:
            sender, told, value = self._queue.get(timeout=60)
            self.heard[sender, told] = value
        return self.heard[rank, topic]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._queue.close()


@pytest.fixture
def start_ranks():
    started: list[Ranks] = []

    def start(work: Callable[..., None], *arguments: Any) -> Ranks:
        started.append(Ranks(work, *arguments))
        return started[-1]

    yield start
    for ranks in started:
        ranks.end()


def _run(work: Callable[..., None], place: Place, queue: Any, arguments: tuple) -> None:
    torch.set_num_threads(1)
    work(place, lambda topic, value=None: queue.put((place.rank, topic, value)), *arguments)


def _train(place: Place, fail_at: int, fail: Callable[[], None]) -> None:
    """DDP steps, where rank 2 calls `fail` before step `fail_at`. The DDP module lives on in the frame."""
    module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(500, 500))
    for step in range(20):
        if place.rank == 2 and step == fail_at:
            fail()
        module(torch.ones(4, 500)).sum().backward()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise ValueError("in user code")


# ---- a group that works


def _reduce_and_report(place: Place, tell: Callable[..., None]) -> None:
    process_group.join(place, timeout_s=60)
    value = torch.tensor([float(place.rank)])
    dist.all_reduce(value)
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_SOCKET_IFNAME")
    environment = {name: os.environ.get(name) for name in names}
    process_group.leave()
    tell("result", (value.item(), dist.is_initialized(), environment, os.environ.get("RANK")))


def test_ranks_join_reduce_and_leave(start_ranks):
    ranks = start_ranks(_reduce_and_report)
    for rank in range(WORLD_SIZE):
        total, still_initialized, environment, rank_afterwards = ranks.hear(rank, "result")
        assert total == 3.0
        assert not still_initialized
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == "3"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["MASTER_PORT"] == str(ranks.store.port)
        assert environment["GLOO_SOCKET_IFNAME"] == "lo"
        assert rank_afterwards is None


def _leave_right_after_the_last_collective(place: Place, tell: Callable[..., None]) -> None:
    for generation in range(5):
        process_group.join(replace(place, generation=generation), timeout_s=60)
        for _ in range(20):
            value = torch.ones(200_000)
            dist.all_reduce(value)
        process_group.leave()
        tell(f"generation {generation}", value.sum().item())


def test_a_rank_that_leaves_first_takes_nothing_from_the_others(start_ranks):
    ranks = start_ranks(_leave_right_after_the_last_collective)
    for rank in range(WORLD_SIZE):
        assert [ranks.hear(rank, f"generation {generation}") for generation in range(5)] == [600_000.0] * 5


def test_backend_follows_the_device():
    assert process_group._resolve_backend(None, "cpu") == "gloo"
    assert process_group._resolve_backend(None, "cuda:1") == "cpu:gloo,cuda:nccl"
    assert process_group._resolve_backend("nccl", "cuda:0") == "cpu:gloo,cuda:nccl"
    assert process_group._resolve_backend("gloo", "cuda:0") == "gloo"


def test_interface_is_the_one_that_leads_to_the_host():
    assert process_group.find_interface("127.0.0.1") == "lo"
    assert process_group.find_interface("no.such.host.invalid") is None


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="this machine has no IPv6")
def test_addresses_may_be_of_ipv6():
    assert process_group.find_interface("::1") == "lo"
    store, port = process_group.open_store("::1")
    other = dist.TCPStore("::1", port, is_master=False, wait_for_workers=False)
    other.set("key", "value")
    assert store.get("key") == b"value"


def test_each_store_has_a_port_of_its_own_and_closes_the_one_before():
    first = process_group.open_store("127.0.0.1")[1]
    store, second = process_group.open_store("127.0.0.1")
    assert first != second
    store.set("key", "value")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", first), timeout=5).close()


def test_the_store_listens_on_the_address_of_the_cluster_alone():
    _, port = process_group.open_store("127.0.0.1")
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5).close()


def test_where_a_node_is_known_by_a_translated_address_the_store_listens_everywhere():
    with process_group._listen("203.0.113.1") as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


# ---- a group that breaks


def _survive(place: Place, tell: Callable[..., None], fail: Callable[[], None]) -> None:
    process_group.join(place, timeout_s=300)
    tell("joined")
    try:
        _train(place, 5, fail)
    except (RuntimeError, ValueError) as error:
        broke_at = time.time()
        process_group.leave()
        tell("error", (type(error).__name__, str(error), process_group.is_peer_loss(error), broke_at))
        threading.Event().wait(60)  # the process lives on, and keeps what it had


@pytest.mark.parametrize("fail", [_die, _raise])
def test_peers_of_a_rank_that_dies_or_raises_are_released_at_once(start_ranks, fail):
    ranks = start_ranks(_survive, fail)
    for rank in range(2):
        kind, text, is_peer_loss, _ = ranks.hear(rank, "error")
        assert kind == "RuntimeError"
        assert is_peer_loss, text
    if fail is _raise:
        kind, text, is_peer_loss, raised_at = ranks.hear(2, "error")
        assert (kind, text, is_peer_loss) == ("ValueError", "in user code", False)
        assert max(ranks.hear(rank, "error")[3] for rank in range(2)) - raised_at < 5.0


def _abort_from_a_second_thread(place: Place, tell: Callable[..., None]) -> None:
    process_group.join(place, timeout_s=300)
    if place.rank == 2:
        tell("hangs")
        threading.Event().wait(60)
    if place.rank == 0:
        aborting = threading.Timer(0.5, process_group.abort)
        aborting.start()
    try:
        dist.all_reduce(torch.ones(10))
    except RuntimeError as error:
        tell("error", process_group.is_peer_loss(error))
        threading.Event().wait(60)


def test_abort_breaks_a_collective_that_a_hung_rank_never_enters(start_ranks):
    ranks = start_ranks(_abort_from_a_second_thread)
    ranks.hear(2, "hangs")
    assert ranks.hear(0, "error") is True


def _wait_for_a_rank_that_never_comes(place: Place, tell: Callable[..., None]) -> None:
    if place.rank == 2:
        return
    aborting = threading.Timer(0.5, process_group.abort)
    aborting.start()
    try:
        process_group.join(place, timeout_s=300)
    except RuntimeError as error:
        tell("error", process_group.is_peer_loss(error))


def test_abort_breaks_a_join(start_ranks):
    ranks = start_ranks(_wait_for_a_rank_that_never_comes)
    assert [ranks.hear(rank, "error") for rank in range(2)] == [True, True]


def _join_what_was_aborted(place: Place, tell: Callable[..., None]) -> None:
    process_group.abort(generation=3)
    try:
        process_group.join(replace(place, generation=3), timeout_s=300)
    except RuntimeError as error:
        tell("error", process_group.is_peer_loss(error))
    process_group.join(replace(place, generation=4), timeout_s=300)
    process_group.leave()
    tell("joined the next", os.environ.get("RANK"))


def test_a_generation_that_was_aborted_before_it_was_joined_waits_for_nobody(start_ranks):
    ranks = start_ranks(_join_what_was_aborted)
    assert [ranks.hear(rank, "error") for rank in range(WORLD_SIZE)] == [True] * WORLD_SIZE
    assert [ranks.hear(rank, "joined the next") for rank in range(WORLD_SIZE)] == [None] * WORLD_SIZE


def _wait_in_vain(place: Place, tell: Callable[..., None]) -> None:
    process_group.join(place, timeout_s=1.0)
    if place.rank == 2:
        threading.Event().wait(60)
    began = time.monotonic()
    try:
        dist.all_reduce(torch.ones(10))
    except RuntimeError as error:
        tell("error", (process_group.is_peer_loss(error), str(error), time.monotonic() - began))
        threading.Event().wait(60)


def test_timeout_is_that_of_a_collective(start_ranks):
    ranks = start_ranks(_wait_in_vain)
    is_peer_loss, text, waited_s = ranks.hear(0, "error")
    assert is_peer_loss, text
    assert waited_s < 10


def _meet_again(place: Place, tell: Callable[..., None], ports: Any) -> None:
    process_group.join(place, timeout_s=300)
    try:
        _train(place, 5, _die)
    except RuntimeError as error:
        if not process_group.is_peer_loss(error):
            raise
    process_group.abort()  # as the driver tells all: the other may wait for this rank, and not for the dead one
    if place.rank == 0:
        _, port = process_group.open_store("127.0.0.1")
        ports.put(port)
    else:
        port = ports.get()
    process_group.rebuild(replace(place, store_port=port, generation=1, world_size=2))
    value = torch.ones(1)
    dist.all_reduce(value)
    tell("rebuilt", (value.item(), os.getpid(), os.environ["WORLD_SIZE"]))
    process_group.leave()


def test_survivors_meet_anew_in_the_same_processes(start_ranks):
    ports: Any = PROCESSES.Queue()
    ranks = start_ranks(_meet_again, ports)
    for rank in range(2):
        total, pid, world_size = ranks.hear(rank, "rebuilt")
        assert total == 2.0
        assert pid == ranks.processes[rank].pid
        assert world_size == "2"


def test_abort_and_leave_without_a_group_do_nothing():
    process_group.abort()
    process_group.leave()
    with pytest.raises(RuntimeError, match="joined before"):
        process_group.rebuild(Place())


def test_peer_loss_is_told_from_the_users_own_errors():
    def wrap(cause: BaseException) -> BaseException:
        error = ValueError("my own text")
        error.__cause__ = cause
        return error

    lost = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:39815")
    assert process_group.is_peer_loss(lost)
    assert process_group.is_peer_loss(wrap(lost))
    assert process_group.is_peer_loss(RuntimeError("NCCL error: remote process exited or there was a network error"))
    assert not process_group.is_peer_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not process_group.is_peer_loss(ValueError("Connection closed by peer"))
    assert not process_group.is_peer_loss(None)


def test_a_group_of_the_users_is_not_left(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        process_group.leave()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
