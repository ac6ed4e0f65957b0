"""Ranks without a driver: a task for one rank in this process, or for several in processes with real gloo between."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from raylight.contract.config import Config
from raylight.contract.messages import Message
from raylight.contract.task import Files, Loaders, Place, Task
from raylight.user.trainer_names import TrainerNames
from raylight.worker import task_runner
from raylight.worker.group import process_group
from raylight.worker.group.control import Control
from raylight.worker.worker import Worker

# Ranks are forked from a server that has all of this imported, and so begin in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "torch._dynamo", "torch.distributed", "pytest", "raylight", "raylight.worker.task_runner"]
TIMEOUT_S = 60.0


def make_task(
    module: Any, train: Any = None, *, stage: str = "fit", callbacks: Iterable[Any] = (), files: Files | None = None,
    loaders: dict[str, Any] | None = None, task: dict[str, Any] | None = None, **config: Any,
) -> Task:  # fmt: skip
    """`config` are fields of Config, `task` further fields of Task, `loaders` those of stages other than training."""
    settings = Config(**{"num_workers": 0, "use_gpu": False, "checkpoint": None, "logger": False, **config})
    given = Loaders(**{"train": train, **(loaders or {})})
    trainer = TrainerNames(settings, list(callbacks))
    options = {"seed": 7, **(task or {})}
    return Task(stage, module, given, settings, list(callbacks), trainer, "version_0", files, **options)


def make_worker(module: Any, train: Any = None, place: Place | None = None, **arguments: Any) -> Worker:
    return Worker(make_task(module, train, **arguments), place or Place(), Control())


def run_task(task: Task, place: Place | None = None, control: Control | None = None) -> list[Message]:
    """All messages of one rank."""
    return list(task_runner.run(task, place or Place(), control or Control()))


def run_ranks(work: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """What `work(place, *arguments)` returns on each of the ranks, in their order. It joins the group itself."""
    PROCESSES.set_forkserver_preload(PRELOADED)
    _store, port = process_group.open_store("127.0.0.1")
    place = Place(world_size=world_size, local_world_size=world_size, store_port=port)
    places = [replace(place, rank=rank, local_rank=rank) for rank in range(world_size)]
    pipes = [PROCESSES.Pipe(duplex=False) for _ in places]
    processes = [
        PROCESSES.Process(target=_work, args=(sender, work, its, arguments))
        for its, (_, sender) in zip(places, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    try:
        return [_receive(receiver) for receiver, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def in_group(work: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """As `run_ranks`, with the group joined."""
    return run_ranks(_join_and_work, work, *arguments, world_size=world_size)


def _join_and_work(place: Place, work: Callable[..., Any], *arguments: Any) -> Any:
    process_group.join(place, timeout_s=TIMEOUT_S)
    try:
        return work(place, *arguments)
    finally:
        process_group.leave()


def _work(sender: Any, work: Callable[..., Any], place: Place, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        sender.send((work(place, *arguments), ""))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def _receive(receiver: Any) -> Any:
    if not receiver.poll(TIMEOUT_S):
        raise TimeoutError("a rank has not answered")
    value, error = receiver.recv()
    if error:
        raise AssertionError(f"on a rank:\n{error}")
    return value
