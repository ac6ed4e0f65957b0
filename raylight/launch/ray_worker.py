"""RankWorker: the actor of a worker: one slot runs the rank's generator, others let the driver act on it meanwhile."""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray

from raylight.contract.errors import NotEnoughResources
from raylight.contract.messages import Finished, Hyperparameters, Message, Notice, Output
from raylight.contract.requests import Request
from raylight.contract.task import Files, Place, Task
from raylight.launch import node_checks, ray_cluster
from raylight.launch.shared_memory import Segment, SegmentAddress, map_segment, memory_domain
from raylight.launch.worker_logs import WorkerLog
from raylight.launch.worker_reset import WorkerReset, free_memory
from raylight.worker.diagnosis.failure import describe_failure
from raylight.worker.group.control import Control

FOLLOW_EVERY_S = 0.25
_PACKED = (Finished, Hyperparameters)
"""Messages that hold the user's objects: tensors, and classes that may be defined in the script."""


@dataclass(frozen=True, slots=True)
class Site:
    """The node and process of an actor."""

    node_id: str
    ip: str
    host: str
    pid: int
    gpu_ids: tuple[str, ...]
    num_cores: int
    memory_domain: str | None
    versions: dict[str, str]
    clock: float


@dataclass(frozen=True, slots=True)
class Order:
    """The part of an actor in one generation of the group."""

    place: Place
    is_fresh: bool
    """Whether a new run begins; otherwise the rank goes on from what it kept."""
    num_threads: int
    visible_gpus: tuple[str, ...]
    environment: dict[str, str | None]
    """Variables to set, or with None to delete."""
    log_files: Files | None


@dataclass(frozen=True, slots=True)
class Packed:
    """A message by way of handover; its buffers travel in the object store."""

    payload: bytes
    buffers: list[Any]


class RankWorker:
    """`run` holds the one default slot for as long as the rank works; the others answer meanwhile."""

    def __init__(self, is_standby: bool = False):
        self._reset = WorkerReset()
        self._num_runs = 0
        self._control = Control()
        self._entry: Callable[..., Iterator[Message]] | None = None
        self._task: Task | None = None
        self._segment: tuple[int, Segment] | None = None
        self._log: WorkerLog | None = None
        self._generation = -1  # that has begun to run
        self._controlled_generation = -1  # that the driver can act on, also before it runs
        self._began = threading.Condition()
        self._imports = threading.Thread(target=_import_torch, args=(is_standby,), name="raylight imports", daemon=True)
        self._imports.start()
        ray_cluster.hold_on_to_head()

    # ---- the rank itself

    @ray.method(num_returns="streaming")
    def run(
        self, order: Order, task: bytes | None, buffers: SegmentAddress | list | None, changes: bytes | None
    ) -> Iterator[Message | Packed]:
        """The rank's messages. `task` with its `buffers` is the pickled (entry, Task), or None to keep what was given
        before; `changes` is a pickled Task without module, data and callbacks, whose fields replace the kept ones."""
        self._imports.join()
        try:
            self._open_log(order)
            for message in self._work(order, task, buffers, changes):
                yield _pack(message) if isinstance(message, _PACKED) else message
        except Exception as error:
            stage, step, _ = self._control.beat
            yield describe_failure(error, step, stage)
        _leave_group()
        self._reset.note_modules()
        problem = self._log.close() if self._log is not None else None
        if problem is not None:
            yield Notice(f"the log of rank {order.place.rank} could not be stored: {problem}", "warning")

    def _work(
        self, order: Order, task: bytes | None, buffers: SegmentAddress | list | None, changes: bytes | None
    ) -> Iterator[Message]:
        from raylight.contract.process_settings import apply_settings
        from raylight.launch import handover  # here, because it needs torch

        control = self._control_of(order.place.generation)
        if order.is_fresh:
            control.keep(None)
            self._entry = self._task = None
            self._reset.note_settings()
            if self._num_runs:
                self._reset.restore()
            self._num_runs += 1
        _set_up_process(order)
        if task is not None:
            self._entry, self._task = handover.load(task, _map(buffers), adopts=True)
            self._reset.note_modules()
            refused = apply_settings(self._task.settings)
            if refused:
                yield Notice(f"not set on this worker as in the script: {', '.join(refused)}", "warning")
        if self._task is None:
            raise RuntimeError("this worker was asked to go on with a run that it has never begun")
        if changes is not None:
            kept, changed = self._task, handover.load(changes, [])
            self._task = replace(
                changed, module=kept.module, loaders=kept.loaders, callbacks=kept.callbacks, trainer=kept.trainer
            )
        yield from _find_entry(self._entry)(self._task, order.place, control)

    @ray.method(num_returns="streaming", concurrency_group="output")
    def follow(self, generation: int) -> Iterator[Output]:
        """The output of the rank in this generation, as it comes."""
        with self._began:
            self._began.wait_for(lambda: self._generation >= generation)
            log = self._log if self._generation == generation else None
        if log is not None:
            for text in log.follow(FOLLOW_EVERY_S):
                yield Output(text)

    def _open_log(self, order: Order) -> None:
        log = None
        try:
            log = WorkerLog(order.log_files, order.place.rank)
        finally:
            with self._began:
                self._log, self._generation = log, order.place.generation
                self._began.notify_all()

    # ---- before and after a run

    @ray.method(concurrency_group="control")
    def describe(self, is_ready: bool = False) -> Site:
        """The site of this worker; `is_ready`: once it could begin at once."""
        if is_ready:
            self._imports.join()
        context = ray.get_runtime_context()
        return Site(
            node_id=context.get_node_id(),
            ip=ray.util.get_node_ip_address(),
            host=socket.gethostname(),
            pid=os.getpid(),
            gpu_ids=tuple(context.get_accelerator_ids().get("GPU", [])),
            num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory_domain=memory_domain(),
            versions=node_checks.find_versions(),
            clock=time.time(),
        )

    @ray.method(concurrency_group="control")
    def look_for(self, record: node_checks.Record) -> str:
        return node_checks.look_for(record)

    @ray.method(concurrency_group="control")
    def open_store(self, host: str) -> int:
        """The port of a rendezvous store, hosted here."""
        self._imports.join()
        from raylight.worker.group import process_group

        return process_group.open_store(host)[1]

    @ray.method(concurrency_group="control")
    def share(self, generation: int, buffers: list[Any]) -> SegmentAddress:
        """Makes the segment from which all workers of this machine map the data of the run that begins."""
        segment = Segment(buffers)
        with self._began:
            self._close_segment(generation)
            self._segment = (generation, segment)
        return segment.address

    def _close_segment(self, up_to: int) -> None:
        if self._segment is not None and self._segment[0] <= up_to:
            self._segment[1].close()
            self._segment = None

    @ray.method(concurrency_group="control")
    def warm_up(self, task: bytes, buffers: SegmentAddress | list | None) -> None:
        """Imports what the run imports, by loading its task and dropping it."""
        self._imports.join()
        from raylight.launch import handover

        handover.load(task, _map(buffers))
        self._reset.note_modules()

    @ray.method(concurrency_group="control")
    def forget(self, generation: int) -> None:
        """Gives back the memory of a run that has ended, unless the next one has begun meanwhile."""
        with self._began:
            self._close_segment(generation)
            if self._generation > generation:
                return
            self._control.keep(None)
            self._entry = self._task = None
        free_memory()

    # ---- while it runs

    def _control_of(self, generation: int) -> Control:
        """Whoever comes first, the rank or the driver's wish, begins the generation; the wish is not lost then."""
        with self._began:
            if generation > self._controlled_generation:
                self._controlled_generation = generation
                self._control.resume()
        return self._control

    @ray.method(concurrency_group="control")
    def hold(self, generation: int) -> int:
        return self._control_of(generation).hold()

    @ray.method(concurrency_group="control")
    def release(self, generation: int, step: int, request: Request | None) -> None:
        self._control_of(generation).release(step, request)

    @ray.method(concurrency_group="control")
    def go_on(self, generation: int) -> None:
        self._control_of(generation).go_on()

    @ray.method(concurrency_group="control")
    def halt(self, generation: int, reason: str, broken: bool) -> None:
        """Makes the rank leave: at its next step boundary, or at once if it is in a collective."""
        control = self._control_of(generation)
        control.abort(reason) if broken else control.stop_now(reason)
        self._imports.join()
        from raylight.worker.group import process_group

        process_group.abort(generation)

    @ray.method(concurrency_group="control")
    def age(self) -> tuple[str, int, float]:
        return self._control.age()

    @ray.method(concurrency_group="control")
    def stacks(self) -> str:
        return self._control.stacks()


_OPTIONS: dict[str, Any] = {
    "max_restarts": 0,
    "max_task_retries": 0,
    "concurrency_groups": {"control": 2, "output": 1},
}
RankActor: Any = ray.remote(**_OPTIONS)(RankWorker)


def _import_torch(is_standby: bool) -> None:
    """Imports what every first step would import. A standby does it in the time that running workers leave."""
    if is_standby and sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + 10))
    # c10d writes a stack trace into the log for each peer that it loses; raylight reports that itself.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    importlib.import_module("torch")
    if is_standby:
        importlib.import_module("torch._dynamo")  # which others load in their first step
    importlib.import_module("raylight.launch.handover")
    importlib.import_module("raylight.worker.task_runner")
    # What is imported stays; the garbage collector need not look through it again, in training or between runs.
    gc.freeze()


def _leave_group() -> None:
    """In case the rank has not: those that wait for it would wait as long as its process lives."""
    from raylight.worker.group import process_group

    process_group.leave()


def _set_up_process(order: Order) -> None:
    import torch

    for name, value in order.environment.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    if order.visible_gpus:
        # All of the node's workers, as libraries expect that take LOCAL_RANK for the number of the device.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(order.visible_gpus)
    if order.place.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise NotEnoughResources(_say_no_gpu(order.place.node))
        torch.cuda.set_device(order.place.device)
    torch.set_num_threads(order.num_threads)


def _say_no_gpu(node: str) -> str:
    import torch

    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    return (
        f"Ray has given this worker a GPU of {node}, and torch {torch.__version__} there, which {built}, can use none. "
        "Does `nvidia-smi` show it on that machine? Then install a torch that fits its driver; else start its Ray "
        "without --num-gpus. To train on CPUs: use_gpu=False."
    )


def _map(buffers: SegmentAddress | list | None) -> list[Any]:
    if isinstance(buffers, SegmentAddress):
        return list(map_segment(buffers))
    return buffers or []


def _find_entry(entry: Callable[..., Iterator[Message]] | str | None) -> Callable[..., Iterator[Message]]:
    if not isinstance(entry, str):
        assert entry is not None
        return entry
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def _pack(message: Message) -> Packed:
    import numpy as np

    from raylight.launch import handover

    payload, buffers = handover.dump(message)
    return Packed(payload, [np.frombuffer(buffer, dtype=np.uint8) for buffer in buffers])


def unpack(packed: Packed) -> Message:
    """In the driver: with memory of its own, so that nothing of the object store stays in use."""
    import numpy as np

    from raylight.launch import handover

    return handover.load(packed.payload, [np.array(buffer) for buffer in packed.buffers])
