"""Where the seconds of a start on Ray go, with ranks that do nothing but meet: the launcher's own part.

python -m benchmarks.ray_stages
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from raylight.contract.config import Config
from raylight.contract.messages import Died, Finished, Message, PeerLost, Progress, Started
from raylight.contract.task import Loaders, Place, Task
from raylight.launch import ray_actors
from raylight.worker.group import process_group
from raylight.worker.group.control import Control, Halted

CONFIG = Config(name="stages", num_workers=2)


def meet(task: Task, place: Place, control: Control) -> Iterator[Message]:
    """Up to where a first batch would begin."""
    yield Started(place.node, os.getpid(), place.device)
    process_group.join(place, timeout_s=60)
    module = torch.nn.parallel.DistributedDataParallel(task.module)
    torch.optim.Adam(module.parameters())
    process_group.leave()
    yield Finished("finished", 0, 0)


def step_until_stopped(task: Task, place: Place, control: Control) -> Iterator[Message]:
    """Collectives as fast as they go; after a loss the ranks meet again and stop at the first step."""
    yield Started(place.node, os.getpid(), place.device)
    step = 0
    try:
        process_group.join(place, timeout_s=60)
        while True:
            torch.distributed.all_reduce(torch.ones(1000))
            step += 1
            if task.attempt or control.tick(step) is not None:
                yield Finished("stopped", step, 0)
                return
            if step % 100 == 0:
                yield Progress("train", 0, step, step, 0)
    except (RuntimeError, Halted) as error:
        yield PeerLost(step, str(error))
    finally:
        process_group.leave()


def main() -> None:
    marks = [("", time.perf_counter())]

    def mark(stage: str) -> None:
        marks.append((stage, time.perf_counter()))
        print(f"{marks[-1][1] - marks[-2][1]:7.3f} s  {stage}", flush=True)

    ray_actors.connect(CONFIG)
    mark("Ray is started")
    group = ray_actors.acquire_group(CONFIG, entry=meet)
    mark("room is reserved, actors are asked for")
    len(group.places)
    mark("actors are up")
    task = Task("fit", torch.nn.Linear(784, 10), Loaders(), CONFIG, [], None, "", None, 0)
    stream = group.run(task)
    mark("torch is imported, the task is handed over")
    next(stream)
    mark("a rank says that it begins")
    list(stream)
    mark("ranks have met, DDP and optimizer are made, all have ended")
    group = ray_actors.acquire_group(CONFIG, entry=meet)
    list(group.run(task))
    mark("all of that again, on the workers that were kept")
    for with_standby in (False, True):
        lose_one(task, with_standby)


def lose_one(task: Task, with_standby: bool) -> None:
    group = ray_actors.acquire_group(CONFIG, entry=step_until_stopped)
    group.steady_after_s = 0.0 if with_standby else 1e9
    pids: dict[int, int] = {}
    killed_at, began = 0.0, time.perf_counter()
    stream = group.run(task)
    for rank, message in stream:
        if isinstance(message, Started):
            pids[rank] = message.pid
        # Long enough for a standby to have imported torch.
        if isinstance(message, Progress) and not killed_at and time.perf_counter() - began > 8:
            killed_at = time.perf_counter()
            os.kill(pids[1], signal.SIGKILL)
        if isinstance(message, Died):
            print(f"{time.perf_counter() - killed_at:7.3f} s  from kill -9 to knowing it")
    group.replace(1)
    for _, message in group.rejoin(replace(task, attempt=1)):
        if isinstance(message, Finished):
            took = time.perf_counter() - killed_at
            print(f"{took:7.3f} s  from kill -9 to the next step, {'with' if with_standby else 'without'} a standby")
            break
    list(stream)


if __name__ == "__main__":
    main()
