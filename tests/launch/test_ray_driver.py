"""What a driver process does to Ray and to the terminal. Each test has a Ray of its own, which a script starts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.scripts import Script, scripts_in

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PREAMBLE = """
import os, signal, sys, threading, time
import torch
from raylight.contract.config import Config
from raylight.launch import ray_actors
from raylight.contract.messages import *
from raylight.contract.requests import Request
from raylight.contract.task import Loaders, Task

CONFIG = Config(name="script", num_workers=2, num_standby=0)

def make_task(module=None, data=None):
    return Task("fit", module, Loaders(train=data), CONFIG, [], None, "", None, 0)

def tick_until_told(task, place, control):
    yield Started(place.node, os.getpid(), place.device)
    step = 0
    while True:
        step += 1
        action = control.tick(step)
        if action is not None:
            yield Finished(action.request, step, 0)
            return
        threading.Event().wait(0.005)
"""


@pytest.fixture
def start_script(tmp_path: Path) -> Iterator[Callable[[str], Script]]:
    with scripts_in(tmp_path) as start:
        yield lambda text: start(PREAMBLE + text)


def test_a_script_trains_its_own_classes_prints_nothing_else_and_leaves_nothing(start_script):
    script = start_script("""
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

def entry(task, place, control):
    print("said by rank", place.rank)
    with torch.no_grad():
        task.module.weight += 1
    yield Finished("finished", 1, 0, {}, task.module)

def main():
    group = ray_actors.acquire_group(CONFIG, entry=entry)
    found, said = "", ""
    for rank, message in group.run(make_task(Net())):
        if isinstance(message, Output):
            said += message.text
        elif rank == 0:
            found = type(message.trained) is Net, message.trained.weight.tolist()
    print(said, *found)

if __name__ == "__main__":
    main()
""")
    assert script.finish() == "said by rank 0\n True [1.0, 1.0, 1.0]\n"
    script.assert_nothing_is_left(within_s=20)


def test_ctrl_c_reaches_the_driver_alone_which_stops_the_workers(start_script):
    script = start_script("""
def main():
    group = ray_actors.acquire_group(CONFIG, entry=tick_until_told)
    signal.signal(signal.SIGINT, lambda number, frame: group.request(Request.INTERRUPT))
    for rank, message in group.run(make_task()):
        print(rank, message.status if isinstance(message, Finished) else "started")

if __name__ == "__main__":
    main()
""")
    assert sorted(script.read_line() for _ in range(2)) == ["0 started", "1 started"]
    os.killpg(script.process.pid, signal.SIGINT)  # as a terminal does: to all processes of the foreground group
    assert sorted(script.finish().splitlines()) == ["0 interrupt", "1 interrupt"]
    script.assert_nothing_is_left(within_s=20)


@pytest.mark.soak
def test_when_the_driver_is_killed_its_workers_and_its_ray_end(start_script):
    script = start_script("""
def main():
    group = ray_actors.acquire_group(CONFIG, entry=tick_until_told)
    for rank, message in group.run(make_task(data=torch.ones(1_000_000))):
        print(rank)

if __name__ == "__main__":
    main()
""")
    assert sorted(script.read_line() for _ in range(2)) == ["0", "1"]
    script.process.kill()
    script.assert_nothing_is_left(within_s=120)  # Ray's own agents look for their raylet only now and then


@pytest.mark.soak
def test_a_ray_that_a_helper_thread_started_outlives_it(start_script):
    script = start_script("""
def entry(task, place, control):
    yield Finished("finished", 1, 0, {}, os.getpid())

def fit(pids):
    group = ray_actors.acquire_group(CONFIG, entry=entry)
    pids.append([m.trained for _, m in group.run(make_task()) if isinstance(m, Finished)])

def main():
    pids = []
    for _ in range(2):
        thread = threading.Thread(target=fit, args=(pids,))
        thread.start()
        thread.join()
    fit(pids)
    print(len(pids), len({tuple(sorted(p)) for p in pids}))

if __name__ == "__main__":
    main()
""")
    assert script.finish() == "3 1\n"
    script.assert_nothing_is_left(within_s=20)


@pytest.mark.soak
def test_a_second_fit_that_asks_for_more_gets_a_larger_ray(start_script):
    script = start_script("""
def entry(task, place, control):
    yield Finished("finished", 1, 0, {}, None)

def main():
    for num_workers in (1, (os.cpu_count() or 1) + 1, 1):
        group = ray_actors.acquire_group(CONFIG, num_workers, entry=entry)
        print(sum(isinstance(m, Finished) for _, m in group.run(make_task())))

if __name__ == "__main__":
    main()
""")
    assert script.finish() == f"1\n{(os.cpu_count() or 1) + 1}\n1\n"
    script.assert_nothing_is_left(within_s=20)


@pytest.mark.soak
def test_ranks_go_by_node_and_a_lost_node_is_told_from_a_lost_process(start_script):
    """Three nodes on this machine. The last is taken away, and another comes."""
    script = start_script("""
from ray.cluster_utils import Cluster

def entry(task, place, control):
    yield Started(place.node, os.getpid(), place.device)
    yield Notice(f"{place.rank} {place.local_rank} {place.node_rank} {place.local_world_size} {place.num_nodes} "
                 f"{task.loaders.train.sum().item():g}")
    step = 0
    try:
        while place.generation == 0:
            step += 1
            control.tick(step)
            threading.Event().wait(0.05)
    except Exception as error:
        yield PeerLost(step, str(error))
        return
    yield Finished("finished", 1, 0)

def main():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    last = cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    group = ray_actors.acquire_group(CONFIG, 5, entry=entry)
    places, ends = {}, {}
    for rank, message in group.run(make_task(data=torch.ones(1_000_000))):
        if isinstance(message, Notice):
            places[rank] = message.text
            if len(places) == 5:
                cluster.remove_node(last, allow_graceful=False)
        elif not isinstance(message, Started):
            ends[rank] = message
    print([places[rank] for rank in range(5)])
    dead = [rank for rank, message in ends.items() if isinstance(message, Died)]
    print(len(dead), {message.node_lost for message in ends.values() if isinstance(message, Died)})
    print(len([message for message in ends.values() if isinstance(message, PeerLost)]))
    print(group.replace(dead[0], timeout_s=1.0))
    cluster.add_node(num_cpus=1)
    while group.num_recruits < 1:
        time.sleep(0.05)
    group.drop(dead)
    print(group.adopt(5))
    places = {}
    for rank, message in group.rejoin(make_task()):
        if isinstance(message, Notice):
            places[rank] = message.text
    print([places[rank] for rank in range(5)])
    ray_actors.release_all()
    import ray
    ray.shutdown()
    cluster.shutdown()

if __name__ == "__main__":
    main()
""")
    lines = script.finish(errors=None).splitlines()  # the test's own nodes are not quiet
    assert eval(lines[0]) == [f"{p} 3 1e+06" for p in ("0 0 0 2", "1 1 0 2", "2 0 1 2", "3 1 1 2", "4 0 2 1")]
    assert lines[1] == "1 {True}"
    assert lines[2] == "4"
    assert lines[3] == "None"
    assert lines[4] == "1"
    assert eval(lines[5]) == [f"{p} 3 1e+06" for p in ("0 0 0 2", "1 1 0 2", "2 0 1 2", "3 1 1 2", "4 0 2 1")]
    script.assert_nothing_is_left(within_s=30)
