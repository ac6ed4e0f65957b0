"""A group of workers on Ray: it runs tasks, acts on ranks that run, and goes on when members are lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from raylight.contract.config import Config
from raylight.contract.messages import Died, Message
from raylight.contract.requests import Request
from raylight.contract.task import Files, Loaders, Place, Task
from raylight.driver.group import Group
from raylight.launch import handover, ray_cluster
from raylight.launch.node_checks import Record
from raylight.launch.ray_daemons import Daemons
from raylight.launch.ray_delivery import Delivery
from raylight.launch.ray_inspection import Inspection
from raylight.launch.ray_placement import Placement
from raylight.launch.ray_roster import Roster, describe_death
from raylight.launch.ray_stream import Stream
from raylight.launch.ray_worker import Order

Entry = str | Callable[..., Iterator[Message]]

CONTROL_TIMEOUT_S = 10.0
"""How long a rank may take to answer; it does so from a second thread, whatever it is doing."""


ANSWER_S = 1.0
"""And how long for a question that is asked again soon."""
HALTED_S = 5.0
"""How long ranks that were halted may take to end before their processes are replaced."""
DEATH_KNOWN_S = 0.05
"""A call to an actor that is dead fails within this. One that lives may take longer, while it frees memory."""


class RayGroup(Group):
    """Workers 0 to world_size - 1. `ray_actors.acquire_group` keeps it from one run to the next."""

    can_recover = True  # those that are left outlive one that is lost

    def __init__(self, roster: Roster):
        self.entry: Entry = "raylight.worker.task_runner:run"
        self.steady_after_s = 5.0
        """How long training runs before standbys are made, so that they take nothing from its start."""
        self.generation = -1
        self._roster = roster
        self._daemons = Daemons()
        self._delivery: Delivery | None = None
        self._log_files: Files | None = None
        self._record: Record | None = None
        self._stream: Stream | None = None
        self._requests: list[Request] = []
        self._end: Request | None = None  # the request that ends this run
        self.in_use = True
        """Until a run has ended or was halted; then another may take the group."""

    @classmethod
    def start(
        cls,
        config: Config,
        num_workers: int,
        use_gpu: bool = False,
        resources_per_worker: dict[str, float] | None = None,
        placement: str = "PACK",
        label: Callable[[], str] | None = None,
        num_standby: int | None = None,
        tell: Callable[[str], object] | None = None,
        make_room: Callable[[], object] = lambda: None,
    ) -> RayGroup:
        """Reserves room for the workers and lets them begin to import torch; does not wait for that.

        `label` says what the actors are called, None: the run's name; it is asked once there is room for them.
        `num_standby` is for each node that holds workers; None: one. `tell` hears what is waited for, if anything, and
        `make_room` is called meanwhile.
        Raises NotEnoughResources, before any actor is made, if the cluster has no room for them.
        """
        needs = {"CPU": 1.0} | ({"GPU": 1.0} if use_gpu else {}) | (resources_per_worker or config.resources_per_worker)
        cluster = ray_cluster.connect(replace(config, num_workers=num_workers, resources_per_worker=needs))
        room = Placement(needs, placement)
        if not room.is_given:
            ray_cluster.check_room(cluster, num_workers, needs, placement)
        roster = Roster(room, config.name, use_gpu, 1 if num_standby is None else num_standby)
        try:
            slots = room.reserve(num_workers, tell, make_room)
            if label is not None:
                roster.rename(label())
            roster.fill(slots)
        except BaseException:
            roster.shutdown()
            raise
        return cls(roster)

    @property
    def world_size(self) -> int:
        return len(self._roster.members)

    @property
    def places(self) -> list[Place]:
        """The place of each rank. Waits for actors that are coming up."""
        for member in self._roster.members:
            member.visit()
        return self._roster.places(store_port=0, generation=self.generation)

    def claim(self) -> None:
        """Keeps others from taking the group until the run that will use it has ended or was halted."""
        self.in_use = True

    def run_by(self, entry: Entry) -> None:
        """The workers call `entry` with the task of the next run."""
        self.entry = entry

    @property
    def is_idle(self) -> bool:
        return not self._running()

    # ---- runs

    def run(self, task: Task, log_files: Files | None = None) -> Stream:
        """Begins `task` on all ranks, from its start; `log_files` takes logs/rank-N.log, None: task.files.

        A rank whose process dies gives a `Died`. When one has failed or died, the others are asked to leave, out of
        collectives too, so that all end soon.
        """
        if not self.is_idle:
            raise RuntimeError("this group is still running a task")
        self.forget()
        self.in_use = True
        self._log_files = log_files if log_files is not None else task.files
        self._roster.rename(task.label)  # of those that join; no actor is renamed
        stamp = task.stamp
        self._record = Record(task.files, task.version_path, stamp) if task.files is not None and stamp else None
        self._delivery = Delivery((self.entry, task))
        self._stream = Stream(self, self.steady_after_s)
        self._begin(None)
        return self._stream

    def rejoin(self, task: Task) -> Stream:
        """A new generation of the group, once all ranks of a broken one have ended: survivors go on from what they
        kept, others begin. Of `task` they take all fields but module, loaders and callbacks, which stay those of `run`.

        The stream that `run` returned goes on.
        """
        if self._stream is None or self._delivery is None or not self.is_idle:
            raise RuntimeError("rejoin needs a run that has broken, and whose ranks have all ended")
        self.in_use = True
        if self._end is not None:  # ranks of the broken generation may have left before they came to it
            self._requests.insert(0, self._end)
        self._delivery.forget_actor_segments()
        changes, _ = handover.dump(replace(task, module=None, loaders=Loaders(), callbacks=[], trainer=None))
        self._begin(changes)
        return self._stream

    def forget(self) -> None:
        """Gives back the memory of the last run, here and in the workers; it cannot be rejoined after that."""
        self._requests.clear()
        self.watch = self._end = None
        self._roster.dismiss_recruits()
        if self._delivery is None:
            return
        self._delivery.close()
        self._delivery = self._stream = None
        for member in self._roster.members:
            member.forget(self.generation)

    def _begin(self, changes: bytes | None) -> None:
        stream, delivery = self._stream, self._delivery
        assert stream is not None
        assert delivery is not None
        self.generation += 1
        members = self._roster.members
        newcomers = [member for member in members if not member.has_begun]
        inspection = Inspection(newcomers, self._record)
        store_port = self._open_store()
        inspection.finish()
        lost = [rank for rank, member in enumerate(members) if not member.visit()]
        for rank in lost:
            stream.report_death(rank, members[rank].death)
        if lost:
            return
        places = self._roster.places(store_port, self.generation)
        generators = {}
        for rank, member in enumerate(members):
            payload = buffers = None
            if not member.has_begun:
                payload, buffers = delivery.payload, delivery.buffers_for(member, self.generation)
            generators[rank] = member.actor.run.remote(self._order(rank, places[rank]), payload, buffers, changes)
        for member in members:
            member.note_begun()
        stream.begin(generators, members[0].actor.follow.remote(self.generation))

    def _open_store(self) -> int:
        """The port of the rendezvous store of this generation, which rank 0 hosts."""
        first = self._roster.members[0]
        if self.world_size == 1 or not first.visit():
            return 0
        try:
            port: int = ray.get(first.actor.open_store.remote(first.site.ip))
            return port
        except RayActorError as error:
            first.note_death(describe_death(error))
            return 0

    def _order(self, rank: int, place: Place) -> Order:
        member = self._roster.members[rank]
        threads = os.environ.get("OMP_NUM_THREADS", "")
        return Order(
            place=place,
            is_fresh=not member.has_begun,
            num_threads=int(threads) if threads.isdigit() else max(1, member.site.num_cores // place.local_world_size),
            visible_gpus=self._roster.visible_gpus(member),
            environment=ray_cluster.changed_environment(),
            log_files=self._log_files,
        )

    # ---- acting on ranks that run

    def request(self, request: Request) -> None:
        """As `hold_and_release`, done by the stream when it is next waited for. Safe in a signal handler.

        One that ends the run is asked for again in every later generation.
        """
        self._requests.append(request)
        if request.ends_run:
            self._end = request

    def hold_and_release(self, request: Request) -> int | None:
        """Makes all running ranks do as requested at one step boundary, which is returned. None: a rank did not
        answer, and none of them acts."""
        actors = [self._roster.members[rank].actor for rank in self._running()]
        if not actors:
            return None
        try:
            held = [actor.hold.remote(self.generation) for actor in actors]
            boundary = max(ray.get(held, timeout=CONTROL_TIMEOUT_S))
        except (RayActorError, GetTimeoutError):
            for actor in actors:
                actor.release.remote(self.generation, 0, None)
            return None
        for actor in actors:
            actor.release.remote(self.generation, boundary, request)
        return boundary

    def pause(self) -> None:
        """Makes all ranks stand still at one step boundary, once what they had begun to write is on storage: then each
        gives a `Paused`, and waits for `resume`. They see to that while the stream is waited for."""
        self.request(Request.PAUSE)

    def resume(self) -> None:
        """Lets all ranks go on."""
        actors = [self._roster.members[rank].actor for rank in self._running()]
        resumed = [actor.go_on.remote(self.generation) for actor in actors]
        ray.wait(resumed, num_returns=len(resumed), timeout=CONTROL_TIMEOUT_S) if resumed else None

    def wait(self) -> None:
        """Until all ranks have left that were halted; what they say on the way out is lost."""
        if self._stream is not None:
            for _ in self._stream:
                continue

    def halt(
        self, ranks: Iterable[int] | None = None, reason: str = "the run was stopped", broken: bool = False
    ) -> None:
        """Makes ranks (None: all that run) leave at once, out of collectives too. `broken`: they keep their state."""
        for rank in self._running() if ranks is None else ranks:
            self._roster.members[rank].actor.halt.remote(self.generation, reason, broken)
        if ranks is None and not broken:
            self.in_use = False
            if self.is_idle:
                self.forget()

    def ages(self) -> dict[int, tuple[str, int, float] | None]:
        """Stage, step and seconds since the last sign of life of each running rank; None: it does not answer at once,
        because it is in native code that does not let Python run, or dead."""
        return self._ask("age", ANSWER_S)

    def stacks(self) -> dict[int, str]:
        """The Python stack of every thread of each running rank."""
        silent = f"no answer within {CONTROL_TIMEOUT_S:g} s: it is in native code that does not let Python run"
        return {rank: text or silent for rank, text in self._ask("stacks", CONTROL_TIMEOUT_S).items()}

    def end_hung(self, rank: int, reason: str, step: int, stacks: str) -> None:
        """Kills the process of a rank that hangs: its `Died` says why, and the others are asked to leave."""
        if self._stream is not None:
            self._stream.end(rank, Died(reason, step=step, stacks=stacks))

    def _running(self) -> list[int]:
        return self._stream.running if self._stream is not None else []

    def _ask(self, question: str, timeout_s: float) -> dict[int, Any]:
        asked = {rank: getattr(self._roster.members[rank].actor, question).remote() for rank in self._running()}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
        return {rank: _answer(reference) for rank, reference in asked.items()}

    # ---- losing and winning members, between two generations

    def replace(self, rank: int, timeout_s: float = 60.0) -> Place | None:
        """Gives a rank another process: a standby if there is one, else a new one in the same room.

        None if there is no room within `timeout_s`; `num_recruits` counts it when it comes later.
        """
        if not self._roster.replace(rank, timeout_s):
            return None
        return self.places[rank]

    def drop(self, ranks: Iterable[int]) -> None:
        """Goes on without these ranks from the next `rejoin`; the others move up."""
        self._roster.drop(set(ranks))

    def recruit_up_to(self, count: int) -> None:
        """Asks for more ranks until they would be `count`, which may take until there is room for them."""
        self._roster.recruit_up_to(count)

    @property
    def num_standbys(self) -> int:
        """How many workers without a rank are up, and could take over at once."""
        return self._roster.num_standbys

    @property
    def num_recruits(self) -> int:
        """How many additional workers are there now and wait to be adopted."""
        return self._roster.num_recruits

    def adopt(self, most: int) -> int:
        """Makes those that wait the last ranks, from the next `rejoin` on, until there are `most`; returns how many."""
        return self._roster.adopt(most - self.world_size)

    def draining(self) -> list[int]:
        """Ranks on nodes that will be taken away soon."""
        nodes = ray_cluster.draining_nodes()
        return [rank for rank, member in enumerate(self._roster.members) if member.node_id in nodes]

    def renew(self, timeout_s: float = 60.0) -> bool:
        """Between runs: replaces members that died or that a halt did not end. False if that was not possible."""
        if self._stream is not None:
            self._stream.drain(HALTED_S)
        gone = set(self._running())
        self.forget()
        asked = [member.actor.age.remote() for member in self._roster.members]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=DEATH_KNOWN_S)
        gone |= {rank for rank, reference in enumerate(asked) if reference in ready and _answer(reference) is None}
        return not self._roster.has_shrunk and all(self._roster.replace(rank, timeout_s) for rank in sorted(gone))

    def shutdown(self) -> None:
        """Ends all its processes, and gives back what was reserved for them."""
        self._roster.shutdown()
        self._stream = None
        if self._delivery is not None:
            self._delivery.close()

    # ---- what the stream asks for

    def perform_requests(self) -> None:
        if self._daemons.look():
            self._requests = [Request.INTERRUPT]
        if self._daemons.dead is not None:
            if self._requests and self.hold_and_release(Request.INTERRUPT) is not None:
                self._requests.clear()
            if self._daemons.is_too_late:
                self._break_off()
            return  # all else would ask what is gone, and wait
        if self.watch is not None:
            self.watch()
        while self._requests:
            if self.hold_and_release(self._requests[0]) is None and self._running():
                return  # a rank is gone, which the stream will say, or too busy to answer: it is asked again
            self._requests.pop(0)

    def on_death(self, rank: int) -> str | None:
        member = self._roster.members[rank]
        if self._daemons.dead is not None or self._daemons.look():
            return None
        self._roster.kill(member)  # it may only be out of reach
        return member.node_id

    def on_steady(self) -> None:
        if self._delivery is None:
            return
        for standby in self._roster.stand_by():
            neighbour = next(member for member in self._roster.members if member.node_id == standby.home)
            buffers = self._delivery.buffers_for(neighbour, self.generation)
            standby.actor.warm_up.remote(self._delivery.payload, buffers)

    def on_end(self, is_whole: bool) -> None:
        self.in_use = False
        if self._daemons.dead is not None or self._daemons.look():
            self._break_off()
        if is_whole:
            self.forget()

    def _break_off(self) -> None:
        """Leaves a Ray whose daemons are gone, and raises what ends the run."""
        self.in_use = False
        self._stream = self._delivery = None
        for member in self._roster.members:
            member.note_death()
        ray_cluster.disconnect()
        raise self._daemons.make_error()

    def kill(self, rank: int) -> None:
        ray.kill(self._roster.members[rank].actor)


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=0)
    except (RayActorError, GetTimeoutError):
        return None
