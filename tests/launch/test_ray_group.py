"""Groups of real actors on the session's Ray. The ranks' generators are defined here and go along by value."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import nn
from torch.utils.data import TensorDataset

from raylight.contract.config import Config
from raylight.contract.errors import NotEnoughResources
from raylight.contract.messages import (
    Died,
    Failure,
    Finished,
    Hyperparameters,
    Message,
    Notice,
    Output,
    PeerLost,
    Progress,
    Started,
)
from raylight.contract.requests import Request
from raylight.contract.task import Loaders, Place, Task
from raylight.launch import ray_actors, ray_cluster
from raylight.launch.ray_group import RayGroup
from raylight.storage.filesystem import Storage
from raylight.worker.group import process_group
from raylight.worker.group.control import Control, Halted

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

CONFIG = Config(name="test", num_standby=0)
Entry = Callable[[Task, Place, Control], Iterator[Message]]


def acquire(entry: Entry, num_workers: int = 2, **arguments: Any) -> RayGroup:
    return ray_actors.acquire_group(CONFIG, num_workers, entry=entry, **arguments)


def make_task(module: Any = None, data: Any = None, trained: tuple[int, int] = (0, 0)) -> Task:
    return Task("fit", module, Loaders(train=data), CONFIG, [], None, "", None, 0, trained=trained)


def collect(stream: Iterator[tuple[int, Message]], world_size: int = 2) -> dict[int, list[Message]]:
    """All messages of each rank, without what was printed."""
    messages: dict[int, list[Message]] = {rank: [] for rank in range(world_size)}
    for rank, message in stream:
        if not isinstance(message, Output):
            messages[rank].append(message)
    return messages


def run(entry: Entry, task: Task | None = None, num_workers: int = 2, **arguments: Any) -> dict[int, list[Message]]:
    group = acquire(entry, num_workers, **arguments)
    return collect(group.run(task or make_task()), num_workers)


def returned(messages: dict[int, list[Message]]) -> list[Any]:
    """What each rank brought back; its failure is the test's."""
    values = []
    for rank in sorted(messages):
        last = messages[rank][-1]
        assert isinstance(last, Finished), getattr(last, "traceback", last)
        values.append(last.trained)
    return values


def finish(value: Any = None) -> Finished:
    return Finished("finished", 1, 0, {}, value)


# ---- a run


def report_place(task: Task, place: Place, control: Control) -> Iterator[Message]:
    yield Started(place.node, os.getpid(), place.device)
    process_group.join(place, timeout_s=60)
    total = torch.tensor([1.0 + place.rank])
    dist.all_reduce(total)
    environment = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    process_group.leave()
    yield finish({"place": place, "total": total.item(), "environment": environment, "pid": os.getpid()})


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_all_ranks_meet_and_their_messages_come_as_one_stream(num_workers: int):
    group = acquire(report_place, num_workers)
    assert group.world_size == num_workers
    results = returned(collect(group.run(make_task()), num_workers))
    for rank, result in enumerate(results):
        place = result["place"]
        assert (place.rank, place.local_rank, place.node_rank) == (rank, rank, 0)
        assert (place.world_size, place.local_world_size, place.num_nodes) == (num_workers, num_workers, 1)
        assert place.device == "cpu"
        assert result["total"] == sum(range(1, num_workers + 1))
        assert result["environment"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_workers),
            "MASTER_ADDR": group.places[0].store_host,
        }
    assert len({result["pid"] for result in results} | {os.getpid()}) == num_workers + 1


def count_with_pauses(task: Task, place: Place, control: Control) -> Iterator[Message]:
    yield Started(place.node, os.getpid(), place.device)
    sent_at = time.time()
    yield Notice(str(sent_at))
    threading.Event().wait(1.0)
    yield finish(time.time())


def test_a_message_arrives_when_it_is_sent_not_when_the_rank_ends():
    arrived_after_s = {}
    for rank, message in acquire(count_with_pauses).run(make_task()):
        if isinstance(message, Notice):
            arrived_after_s[rank] = time.time() - float(message.text)
    assert max(arrived_after_s.values()) < 0.5


def test_a_group_can_be_named_by_module_and_function():
    group = ray_actors.acquire_group(CONFIG, 2, entry="raylight.no_such_module:run")
    messages = collect(group.run(make_task()))
    for rank in range(2):
        failure = messages[rank][-1]
        assert isinstance(failure, Failure)
        assert "no_such_module" in failure.text


def test_actors_have_names_that_people_can_read():
    group = acquire(report_place)
    collect(group.run(make_task()))
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert {"raylight:test:rank0", "raylight:test:rank1"} <= names


# ---- what goes there and back


class Net(nn.Module):
    """Defined in a module that workers cannot import."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.tied = self.layer
        self.big = nn.Parameter(torch.zeros(2_000_000))


def train_a_little(task: Task, place: Place, control: Control) -> Iterator[Message]:
    yield Hyperparameters({"net": type(task.module)})
    with torch.no_grad():
        task.module.big += 1 + place.rank
        task.module.layer.weight.fill_(7)
    yield finish(task.module)


def test_the_module_comes_back_as_the_class_it_was_and_with_memory_of_its_own():
    messages = run(train_a_little, make_task(Net()))
    assert messages[0][0] == Hyperparameters({"net": Net})
    for rank, net in enumerate(returned(messages)):
        assert type(net) is Net
        assert torch.equal(net.big, torch.full((2_000_000,), 1.0 + rank))
        assert net.tied is net.layer
        assert net.layer.weight[0, 0] == 7
        with torch.no_grad():
            net.big.fill_(0)


def write_into_data(task: Task, place: Place, control: Control) -> Iterator[Message]:
    process_group.join(place, timeout_s=60)
    data, array = task.loaders.train
    total = float(data.tensors[0].sum()) + float(array.sum())
    dist.barrier()  # both have mapped and touched all of it
    copied_before = copied_bytes()
    data.tensors[0][:1000] = place.rank + 5.0
    array[:1000] = place.rank + 5.0
    dist.barrier()  # both have written
    seen = float(data.tensors[0][0]), float(array[0])
    copied = copied_bytes() - copied_before
    process_group.leave()
    yield finish({"total": total, "seen": seen, "copied_before": copied_before, "copied": copied})


def copied_bytes() -> int:
    """How much of the segments this process has a copy of."""
    copied, in_segment = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split()[0]:
                in_segment = "memfd:raylight" in line
            elif in_segment and line.startswith("Anonymous:"):
                copied += int(line.split()[1]) * 1024
    return copied


def test_workers_share_one_copy_of_the_data_and_do_not_see_each_others_writes():
    tensor, array = torch.ones(25_000_000), np.ones(2_000_000)  # 100 MB and 16 MB
    results = returned(run(write_into_data, make_task(data=(TensorDataset(tensor), array))))
    for rank, result in enumerate(results):
        assert result["total"] == 27_000_000
        assert result["seen"] == (rank + 5.0, rank + 5.0)
        assert result["copied_before"] == 0
        assert 0 < result["copied"] < 100_000
    assert tensor[0] == 1.0
    assert array[0] == 1.0


# ---- what ranks print


def print_and_work(task: Task, place: Place, control: Control) -> Iterator[Message]:
    yield Started(place.node, os.getpid(), place.device)
    print(f"rank {place.rank} at {time.time()}")
    os.system(f"echo rank {place.rank} from a child")
    threading.Event().wait(1.5)
    print("the end")
    yield finish()


def test_output_is_in_the_logs_and_rank_0s_comes_while_it_works(tmp_path):
    texts = []
    for rank, message in acquire(print_and_work).run(make_task(), log_files=Storage(tmp_path)):
        if isinstance(message, Output):
            assert rank == 0
            texts.append((message.text, time.time()))
    first, arrived_at = texts[0]
    assert arrived_at - float(first.split()[3]) < 1.2
    assert "".join(text for text, _ in texts) == (tmp_path / "logs" / "rank-0.log").read_text()
    for rank in range(2):
        log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert log.startswith(f"rank {rank} at ")
        assert f"rank {rank} from a child\n" in log
        assert log.endswith("the end\n")


def print_much(task: Task, place: Place, control: Control) -> Iterator[Message]:
    for number in range(200):
        print(number)
        if number % 10 == 0:
            yield Notice("between")
    yield finish()


def test_no_output_is_lost_or_repeated():
    texts = [m.text for _, m in acquire(print_much).run(make_task()) if isinstance(m, Output)]
    assert "".join(texts) == "".join(f"{number}\n" for number in range(200))


# ---- failures


def raise_on_rank_1(task: Task, place: Place, control: Control) -> Iterator[Message]:
    yield Started(place.node, os.getpid(), place.device)
    process_group.join(place, timeout_s=300)
    if place.rank == 1:
        raise ValueError("on purpose")
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        control.check()
        yield PeerLost(0, str(error))
        return
    yield finish()


def test_an_exception_reaches_the_driver_and_the_others_are_released():
    messages: dict[int, list[Message]] = {0: [], 1: []}
    failed_at = 0.0
    for rank, message in acquire(raise_on_rank_1).run(make_task()):
        messages[rank].append(message)
        if rank == 1 and isinstance(message, Failure):
            failed_at = time.monotonic()
    assert time.monotonic() - failed_at < 5
    failure = messages[1][-1]
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.text) == ("ValueError", "on purpose")
    assert "raise_on_rank_1" in failure.traceback
    assert isinstance(messages[0][-1], (Failure, PeerLost))


def die_or_survive(task: Task, place: Place, control: Control) -> Iterator[Message]:
    """Steps with a collective; the rank that the module names kills itself once. Survivors keep their count."""
    yield Started(place.node, os.getpid(), place.device)
    kept = control.kept or {}
    control.keep(kept)
    process_group.join(place, timeout_s=300)
    try:
        steps = torch.tensor([kept.setdefault("step", 0)])
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        kept["step"] = int(steps)
        yield Progress("train", 0, kept["step"], kept["step"], 0)
        while kept["step"] < 100:
            if (task.attempt, place.rank, kept["step"]) == (0, task.module["victim"], 50):
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(1000))
            kept["step"] += 1
            control.tick(kept["step"])
    except Halted as halted:
        yield PeerLost(kept["step"], halted.reason)
        return
    except RuntimeError as error:
        if not process_group.is_peer_loss(error):
            raise
        yield PeerLost(kept["step"], str(error))
        return
    finally:
        process_group.leave()
    yield finish({"pid": os.getpid(), "attempt": task.attempt, "step": kept["step"], "module": task.module})


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_survivors_of_a_kill_keep_their_process_and_state_and_meet_a_replacement(victim: int):
    group = acquire(die_or_survive, 3)
    pids, messages = {}, {}
    stream = group.run(make_task({"victim": victim}))
    for rank, message in stream:
        if isinstance(message, Started):
            pids[rank] = message.pid
        messages[rank] = message
    survivors = {0, 1, 2} - {victim}
    died = messages.pop(victim)
    assert isinstance(died, Died)
    assert "killed" in died.reason
    assert not died.node_lost
    assert all(isinstance(message, PeerLost) and message.step == 50 for message in messages.values()), messages

    place = group.replace(victim)
    assert place is not None
    assert place.rank == victim
    task = make_task("another module, which must not arrive")
    task.attempt = 1
    steps = {}
    results = {}
    for rank, message in group.rejoin(task):
        if isinstance(message, Progress):
            steps[rank] = message.step
        if isinstance(message, Finished):
            results[rank] = message.trained
    assert steps == {0: 50, 1: 50, 2: 50}
    for rank in range(3):
        assert (results[rank]["pid"] == pids[rank]) is (rank in survivors)
        assert results[rank]["attempt"] == 1
        assert results[rank]["step"] == 100
        assert results[rank]["module"] == {"victim": victim}


def test_a_kill_is_noticed_at_once():
    group = acquire(wait_for_action)
    pids: dict[int, int] = {}
    killed_at = noticed_at = 0.0
    for rank, message in group.run(make_task()):
        if isinstance(message, Started):
            pids[rank] = message.pid
            if len(pids) == 2:
                killed_at = time.monotonic()
                os.kill(pids[1], signal.SIGKILL)
        if isinstance(message, Died):
            assert rank == 1
            noticed_at = time.monotonic()
    assert 0 < noticed_at - killed_at < 1.0


def wait_for_action(task: Task, place: Place, control: Control) -> Iterator[Message]:
    """Ticks, without a collective, until it is told to end."""
    yield Started(place.node, os.getpid(), place.device)
    step = place.rank * 1000  # ranks are at different steps
    try:
        while True:
            step += 1
            control.beat = ("train", step, time.monotonic())
            action = control.tick(step)
            if action is not None and action.request is Request.STOP:
                yield Finished("stopped", step, 0)
                return
            threading.Event().wait(0.001)
    except Halted as halted:
        yield PeerLost(step, halted.reason) if halted.broken else Finished("interrupted", step, 0)


def test_a_stop_that_meets_a_death_is_asked_for_again():
    """The ranks that are left answer, and leave before they come to the boundary."""
    group = acquire(wait_for_action)
    pids: dict[int, int] = {}
    for rank, message in group.run(make_task()):
        if isinstance(message, Started):
            pids[rank] = message.pid
            if len(pids) == 2:
                os.kill(pids[1], signal.SIGKILL)
        if isinstance(message, Died):
            group.request(Request.STOP)
    assert group.replace(1) is not None
    stream = group.rejoin(make_task())
    timer = threading.Timer(20.0, group.halt)
    timer.start()
    assert [messages[-1].status for messages in collect(stream).values()] == ["stopped", "stopped"]
    timer.cancel()
    stream = group.run(make_task())  # another run is not ended by it
    assert group.hold_and_release(Request.STOP) is not None
    collect(stream)


def test_a_standby_takes_over_and_is_made_anew():
    group = ray_actors.acquire_group(CONFIG, 2, num_standby=1, entry=die_or_survive)
    group.steady_after_s = 0.0
    group.run_by(progress_until_stopped)
    pids: dict[int, int] = {}
    stream = group.run(make_task())
    for rank, message in stream:
        if isinstance(message, Started):
            pids[rank] = message.pid
        if isinstance(message, Progress) and len(pids) == 2 and group.num_standbys == 1:
            step = message.step
            os.kill(pids[1], signal.SIGKILL)
            break
    last = dict(stream)
    assert isinstance(last[1], Died)
    began = time.monotonic()
    assert group.replace(1) is not None
    assert group.num_standbys == 0
    assert time.monotonic() - began < 10
    for rank, message in group.rejoin(make_task(trained=(step, 0))):
        if isinstance(message, Started):
            assert (message.pid == pids[rank]) is (rank == 0)
        if isinstance(message, Progress) and group.num_standbys == 1:
            group.request(Request.STOP)
            break
    assert all(isinstance(message, Finished) for message in dict(stream).values())


def progress_until_stopped(task: Task, place: Place, control: Control) -> Iterator[Message]:
    yield Started(place.node, os.getpid(), place.device)
    step, _ = task.trained
    try:
        while True:
            step += 1
            action = control.tick(step)
            if action is not None:
                yield Finished("stopped", step, 0)
                return
            if step % 20 == 0:
                yield Progress("train", 0, step, step, 0)
            threading.Event().wait(0.005)
    except Halted as halted:
        yield PeerLost(step, halted.reason)


# ---- acting on ranks that run


def test_an_action_is_done_by_all_ranks_at_one_boundary():
    group = acquire(wait_for_action)
    finished = {}
    started = 0
    boundary = None
    for rank, message in group.run(make_task()):
        started += isinstance(message, Started)
        if started == 2 and boundary is None:
            boundary = group.hold_and_release(Request.STOP)
        if isinstance(message, Finished):
            finished[rank] = message
    assert boundary is not None
    assert boundary > 1000
    assert {rank: message.step for rank, message in finished.items()} == {0: boundary, 1: boundary}


def test_a_request_of_a_signal_handler_is_done_while_the_stream_waits():
    group = acquire(wait_for_action)
    before = signal.signal(signal.SIGALRM, lambda number, frame: group.request(Request.STOP))
    try:
        stream = group.run(make_task())
        # A rank that has not begun would agree to any boundary, and these two begin at different steps.
        assert {rank for rank, message in (next(stream), next(stream)) if isinstance(message, Started)} == {0, 1}
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        messages = collect(stream)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert messages[0][-1].status == messages[1][-1].status == "stopped"
    assert messages[0][-1].step == messages[1][-1].step


def test_a_request_before_the_ranks_have_begun_is_not_lost():
    ray_actors.release_all()  # new actors are still importing torch when they are asked
    group = acquire(wait_for_action)
    stream = group.run(make_task())
    group.request(Request.STOP)
    messages = collect(stream)
    assert messages[0][-1].status == messages[1][-1].status == "stopped"
    assert len(messages[0]) == len(messages[1]) == 2


def test_an_exception_of_a_signal_handler_leaves_the_stream_whole():
    group = acquire(wait_for_action)

    def on_signal(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, on_signal)
    stream = group.run(make_task())
    try:
        started = [next(stream)[1], next(stream)[1]]
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert all(isinstance(message, Started) for message in started)
    assert group.hold_and_release(Request.STOP) is not None
    assert all(isinstance(messages[-1], Finished) for messages in collect(stream).values())


def block_in_a_collective(task: Task, place: Place, control: Control) -> Iterator[Message]:
    yield Started(place.node, os.getpid(), place.device)
    process_group.join(place, timeout_s=300)
    control.beat = ("train", 7, time.monotonic())
    if place.rank == 1:
        stuck_in_user_code()
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        yield PeerLost(7, str(error))


def stuck_in_user_code() -> None:
    while True:
        time.sleep(0.05)  # a signal or an exception could end it, an event could not


def test_stacks_and_ages_tell_where_ranks_hang_and_a_halt_frees_those_in_collectives():
    group = acquire(block_in_a_collective)
    stream = group.run(make_task())
    started = 0
    for _, message in stream:
        started += isinstance(message, Started)
        if started == 2:
            break
    ages: dict = {}
    while {age[:2] for age in ages.values()} != {("train", 7)}:
        ages = group.ages()
    stacks = group.stacks()
    assert "stuck_in_user_code" in stacks[1]
    assert "all_reduce" in stacks[0]
    group.halt([0, 1], "rank 1 hangs", broken=True)
    rank, message = next(stream)
    assert (rank, type(message)) == (0, PeerLost)
    group.kill(1)
    rank, message = next(stream)
    assert (rank, type(message)) == (1, Died)
    assert list(stream) == []


def test_a_rank_that_does_not_stop_is_ended(monkeypatch: pytest.MonkeyPatch):
    from raylight.launch import ray_stream

    monkeypatch.setattr(ray_stream, "GRACE_AFTER_FAILURE_S", 1.0)
    messages = run(hang_while_another_fails)
    assert isinstance(messages[0][-1], Failure)
    assert isinstance(messages[1][-1], Died)
    assert "did not stop" in messages[1][-1].reason


def hang_while_another_fails(task: Task, place: Place, control: Control) -> Iterator[Message]:
    yield Started(place.node, os.getpid(), place.device)
    if place.rank == 1:
        stuck_in_user_code()
    raise ValueError("on purpose")


# ---- from one run to the next


def leave_traces(task: Task, place: Place, control: Control) -> Iterator[Message]:
    before = {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "kept": control.kept,
        "directory": os.getcwd(),
        "variable": os.environ.get("LEFT_BY_A_RUN"),
        "driver_variable": os.environ.get("SET_BY_THE_DRIVER"),
        "threads": torch.get_num_threads(),
    }
    numbers = random.random(), float(np.random.rand()), float(torch.rand(1))
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    control.keep({"trace": 1})
    os.chdir("/")
    os.environ["LEFT_BY_A_RUN"] = "1"
    torch.set_num_threads(3)
    yield finish({"pid": os.getpid(), "before": before, "numbers": numbers})


def test_workers_are_kept_and_come_back_as_good_as_new(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = [returned(run(leave_traces)) for _ in range(2)]
    monkeypatch.setenv("SET_BY_THE_DRIVER", "yes")
    runs.append(returned(run(leave_traces)))
    for rank in range(2):
        assert len({results[rank]["pid"] for results in runs}) == 1
        first, second, third = (results[rank] for results in runs)
        assert second["before"] == first["before"]
        assert first["before"]["grad"] is True
        assert first["before"]["dtype"] is torch.float32
        assert first["before"]["kept"] is None
        assert first["before"]["threads"] == 1
        assert first["before"]["driver_variable"] is None
        assert third["before"]["driver_variable"] == "yes"
        assert not set(first["numbers"]) & set(second["numbers"])
        assert not set(second["numbers"]) & set(third["numbers"])


def test_a_user_module_that_was_edited_is_imported_afresh(tmp_path):
    (tmp_path / "user_part.py").write_text("VALUE = 1\n")
    (tmp_path / "user_model.py").write_text("from user_part import VALUE\n")

    def import_it(task: Task, place: Place, control: Control) -> Iterator[Message]:
        import sys

        sys.path.insert(0, str(tmp_path))
        import user_model

        yield finish((os.getpid(), user_model.VALUE, id(user_model)))

    before, same = (returned(run(import_it))[0] for _ in range(2))
    (tmp_path / "user_part.py").write_text("VALUE = 1 + 1\n")
    edited = returned(run(import_it))[0]
    assert before == same
    assert (edited[0], edited[1]) == (before[0], 2)


def test_a_worker_that_died_between_runs_is_replaced():
    pids = [result["pid"] for result in returned(run(report_place))]
    os.kill(pids[1], signal.SIGKILL)
    wait_until_gone(pids[1])
    again = [result["pid"] for result in returned(run(report_place))]
    assert again[0] == pids[0]
    assert again[1] != pids[1]


def test_a_member_that_is_dead_when_a_run_begins_can_be_replaced_and_joined():
    ray_actors.release_all()
    group = acquire(report_place)
    ray.kill(group._roster.members[1].actor)  # before it is up
    died = collect(group.run(make_task()))
    assert [type(message) for message in died[1]] == [Died]
    assert died[0] == []
    assert group.replace(1) is not None
    assert len(returned(collect(group.rejoin(make_task())))) == 2


def test_a_halted_run_that_nobody_listens_to_leaves_its_workers_for_the_next():
    group = acquire(wait_for_action)
    stream = group.run(make_task())
    pids = {message.pid for message in (next(stream)[1], next(stream)[1]) if isinstance(message, Started)}
    group.halt()
    again = acquire(report_place)
    assert again is group
    assert {result["pid"] for result in returned(collect(again.run(make_task())))} == pids


@pytest.mark.soak
def test_an_idle_group_gives_way_where_there_is_no_room_for_both():
    ray_actors.release_all()
    two = [result["pid"] for result in returned(run(report_place))]
    three = [result["pid"] for result in returned(run(report_place, num_workers=3))]
    assert [result["pid"] for result in returned(run(report_place))] == two
    returned(run(report_place, num_workers=1, resources_per_worker={"CPU": 7}))
    for pid in [*two, *three]:
        wait_until_gone(pid)


def test_a_group_that_runs_is_not_given_to_another():
    first = acquire(wait_for_action)
    stream = first.run(make_task())
    next(stream)
    second = acquire(report_place)
    assert second is not first
    pids = {result["pid"] for result in returned(collect(second.run(make_task())))}
    with pytest.raises(RuntimeError, match="still running"):
        first.run(make_task())
    first.halt()
    messages = collect(stream)
    assert [messages[rank][-1].status for rank in range(2)] == ["interrupted"] * 2
    third = acquire(report_place)
    assert third in (first, second)
    assert pids


def test_release_leaves_nothing_behind():
    pids = [result["pid"] for result in returned(run(report_place))]
    ray_actors.release_all()
    for pid in pids:
        wait_until_gone(pid)
    assert not [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "raylight:" in actor["name"]]
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


# ---- room


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_workers": 2, "use_gpu": True}, ["1 GPU", "0 GPU", "use_gpu=False"]),
        (
            {"num_workers": 2, "resources_per_worker": {"CPU": 2, "licence": 1}},
            ["2 CPU, 1 licence", "8 CPU, 0 licence"],
        ),
        ({"num_workers": 2, "placement": "STRICT_SPREAD"}, ["1 node:", "num_workers=1 would fit"]),
        ({"num_workers": 1, "resources_per_worker": {"licence": 1}}, ["1 licence", "not one of them"]),
    ],
)
def test_what_cannot_fit_is_told_before_any_actor_is_made(arguments: dict[str, Any], says: list[str]):
    ray_actors.release_all()
    with pytest.raises(NotEnoughResources) as caught:
        ray_actors.acquire_group(CONFIG, **arguments)
    for words in says:
        assert words in str(caught.value)
    assert not [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "raylight:" in actor["name"]]


@pytest.mark.soak
def test_what_is_in_use_is_waited_for_and_told():
    ray_actors.release_all()
    holder = acquire(wait_for_action, resources_per_worker={"CPU": 4})
    stream = holder.run(make_task())
    next(stream)
    heard = []

    def hear(text: str) -> None:
        heard.append(text)
        holder.halt()
        collect(stream)

    group = acquire(report_place, 3, tell=hear)
    assert len(returned(collect(group.run(make_task()), 3))) == 3
    assert "waiting for room for 3 workers with 1 CPU each" in heard[0]


def run_in_trial(num_workers: int) -> Any:
    try:
        group = ray_actors.acquire_group(CONFIG, num_workers, entry=report_place)
        return [result["total"] for result in returned(collect(group.run(make_task()), num_workers))]
    except NotEnoughResources as error:
        return str(error)
    finally:
        ray_actors.release_all()


def test_inside_a_placement_group_workers_take_its_bundles():
    """As a trial of a sweep is: nothing else is reserved, so that trials cannot wait for each other."""
    ray_actors.release_all()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    bundles = ray.util.placement_group([{"CPU": 1}, {"CPU": 3}, {"CPU": 3}])
    ray.get(bundles.ready())
    place = PlacementGroupSchedulingStrategy(bundles, 0, placement_group_capture_child_tasks=True)
    trial = ray.remote(run_in_trial).options(num_cpus=1, scheduling_strategy=place)
    num_groups = len(ray.util.placement_group_table())
    assert ray.get(trial.remote(2)) == [3.0, 3.0]
    assert "make one bundle for each worker" in ray.get(trial.remote(4))
    assert len(ray.util.placement_group_table()) == num_groups
    ray.util.remove_placement_group(bundles)


def test_more_members_can_be_taken_on_and_let_go():
    group = acquire(say_generation, 2)
    assert len(collect(group.run(make_task()))[1]) == 1
    group.recruit_up_to(3)
    deadline = time.monotonic() + 30
    while group.num_recruits < 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert group.adopt(3) == 1
    messages = collect(group.rejoin(make_task()), 3)
    assert {rank: messages[rank][-1].reason for rank in range(3)} == {0: "0 of 3", 1: "1 of 3", 2: "2 of 3"}
    group.drop([0])
    assert group.world_size == 2
    messages = collect(group.rejoin(make_task()), 2)
    assert {rank: messages[rank][-1].reason for rank in range(2)} == {0: "0 of 2", 1: "1 of 2"}
    ray_actors.release_all()


def say_generation(task: Task, place: Place, control: Control) -> Iterator[Message]:
    yield PeerLost(0, f"{place.rank} of {place.world_size}")


def test_room_is_counted_by_node():
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 3.0}, {"CPU": 0.3, "GPU": 8.0}]
    assert ray_cluster.count_fitting(nodes, {"CPU": 1.0}) == 7
    assert ray_cluster.count_fitting(nodes, {"CPU": 1.0, "GPU": 1.0}) == 2
    assert ray_cluster.count_fitting(nodes, {"CPU": 0.1, "GPU": 0.0}) == 73
    assert ray_cluster.count_fitting(nodes, {"CPU": 2.0}, "STRICT_PACK") == 2
    assert ray_cluster.count_fitting(nodes, {"CPU": 2.0}, "STRICT_SPREAD") == 2
    assert ray_cluster.count_fitting([], {"CPU": 1.0}) == 0
