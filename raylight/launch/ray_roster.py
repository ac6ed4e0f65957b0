"""Roster: the members of a group of workers: the actor of each rank, standbys, and recruits still to come."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylight.contract.task import Place
from raylight.launch.ray_placement import Placement, Slot
from raylight.launch.ray_worker import RankActor, Site

NO_RAYLIGHT = "raylight cannot be imported"
RETRY_EVERY_S = 0.5
"""Ray may send a new actor to a node whose loss it has not noticed yet."""


@dataclass(eq=False, slots=True)
class Member:
    """One actor, and the room it is in."""

    actor: Any
    slot: Slot | None
    """None for a standby, which takes no room until it takes a place."""
    described: ray.ObjectRef[Site]
    """The answer to `describe`, when it comes."""
    seen: Site | None = None
    """Its site, once it is up."""
    home: str = ""
    """The node that a standby was made for."""
    gpu_ids: tuple[str, ...] = ()
    has_begun: bool = False
    """Whether it has state of the current run."""
    is_dead: bool = False
    death: str = "its process ended before it began"
    asked_at: float = field(default_factory=time.time)

    def visit(self, timeout_s: float | None = None) -> bool:
        """Waits until the actor is up; False if it is dead, or not up in time."""
        if self.seen is None and not self.is_dead:
            try:
                self.seen = ray.get(self.described, timeout=timeout_s)
                self.gpu_ids = self.gpu_ids or self.site.gpu_ids
            except RayActorError as error:
                self.note_death(describe_death(error))
            except GetTimeoutError:
                return False
        return not self.is_dead

    def note_death(self, reason: str | None = None) -> None:
        """`reason`: None if it is known already, or of no interest."""
        self.is_dead, self.death = True, reason if reason is not None else self.death

    def note_begun(self) -> None:
        """It has state of the current run."""
        self.has_begun = True

    def forget(self, generation: int) -> None:
        """Gives back the memory of the run that has ended."""
        if self.has_begun and not self.is_dead:
            self.actor.forget.remote(generation)
        self.has_begun = False

    def take_place_of(self, other: Member) -> None:
        self.slot, self.gpu_ids = other.slot, other.gpu_ids

    @property
    def site(self) -> Site:
        assert self.seen is not None, "visit it first"
        return self.seen

    @property
    def is_up(self) -> bool:
        return self.visit(timeout_s=0)

    def answers(self, timeout_s: float = 1.0) -> bool:
        """Whether its process lives, now."""
        try:
            ray.get(self.actor.age.remote(), timeout=timeout_s)
        except (RayActorError, GetTimeoutError):
            return False
        return True

    @property
    def node_id(self) -> str:
        return self.seen.node_id if self.seen is not None else self.home


class Roster:
    """`members` in the order of their ranks."""

    def __init__(self, placement: Placement, label: str, use_gpu: bool, num_standby: int):
        self.label = label
        """The name of actors that are made from now on."""
        self.members: list[Member] = []
        self._placement, self._use_gpu, self._num_standby = placement, use_gpu, num_standby
        self._standbys: list[Member] = []
        self._recruits: list[Member] = []
        self.has_shrunk = False
        """Whether it holds room that it makes no use of."""

    # ---- coming and going

    def rename(self, label: str | None) -> None:
        """`label`: the name of those that join; None leaves it."""
        self.label = label or self.label

    def fill(self, slots: list[Slot]) -> None:
        self.members = [self._enlist(slot, f"rank{rank}") for rank, slot in enumerate(slots)]

    def replace(self, rank: int, timeout_s: float) -> bool:
        """Gives a rank another actor: a standby of its node at once, else a new one in the same room.

        False if that is not up within `timeout_s`, because its node is gone and there is no other; then the room
        stays asked for, and `num_recruits` counts who comes later.
        """
        old = self.members[rank]
        self.kill(old)
        standby = next((one for one in self._standbys if one.node_id == old.node_id and one.answers()), None)
        if standby is not None:
            self._standbys.remove(standby)
            standby.take_place_of(old)
            self.members[rank] = standby
            return True
        deadline = time.monotonic() + timeout_s
        while True:
            new = self._enlist(old.slot, f"rank{rank}")
            if new.visit(max(0.0, deadline - time.monotonic())):
                self.members[rank] = new
                return True
            if time.monotonic() >= deadline:
                self._recruits.append(self._enlist_recruit(old.slot, new.actor))
                return False
            time.sleep(RETRY_EVERY_S)

    def recruit_up_to(self, count: int) -> None:
        """Asks for room and actors, which come when there is room, until members and recruits are `count`."""
        for _ in range(count - len(self.members) - len(self._recruits)):
            self._recruits.append(self._enlist_recruit(self._placement.extend()))

    def dismiss_recruits(self) -> None:
        """Takes back what was asked for and has not come, or was not adopted."""
        for one in self._recruits:
            self.kill(one)
            if one.slot is not None:
                self._placement.give_back(one.slot)
        self._recruits = []

    @property
    def num_recruits(self) -> int:
        """How many are there and could join."""
        for index, one in enumerate(self._recruits):
            if not one.is_up and one.is_dead:
                self._recruits[index] = self._enlist_recruit(one.slot)
        return sum(one.is_up for one in self._recruits)

    def adopt(self, count: int) -> int:
        """Recruits that are there become the last ranks, `count` of them at most; returns how many."""
        arrived = [one for one in self._recruits if one.is_up][: max(0, count)]
        self._recruits = [one for one in self._recruits if one not in arrived]
        self.members += arrived
        return len(arrived)

    def drop(self, ranks: set[int]) -> None:
        """Goes on without these; the others move up."""
        for rank in ranks:
            self.kill(self.members[rank])
        self.members = [member for rank, member in enumerate(self.members) if rank not in ranks]
        self.has_shrunk = True

    def stand_by(self) -> list[Member]:
        """Makes the standbys that are missing on nodes that hold members, and returns them."""
        self._standbys = [one for one in self._standbys if one.is_up or not one.is_dead]
        made = []
        for node_id in {member.node_id for member in self.members if not member.is_dead}:
            options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
            for _ in range(self._num_standby - sum(one.node_id == node_id for one in self._standbys)):
                made.append(self._create("standby", None, options, home=node_id))
        self._standbys += made
        return made

    @property
    def num_standbys(self) -> int:
        return sum(one.is_up for one in self._standbys)

    def kill(self, member: Member) -> None:
        member.note_death()
        ray.kill(member.actor)

    def shutdown(self) -> None:
        for member in [*self.members, *self._standbys, *self._recruits]:
            self.kill(member)
        self.members, self._standbys, self._recruits = [], [], []
        self._placement.remove()

    def _enlist(self, slot: Slot | None, role: str) -> Member:
        assert slot is not None
        return self._create(role, slot, self._placement.actor_options() | {"scheduling_strategy": slot.strategy})

    def _enlist_recruit(self, slot: Slot | None, actor: Any = None) -> Member:
        """One that counts as there once it has imported what the run needs, so that nobody waits for that."""
        if actor is None:
            actor = self._enlist(slot, "recruit").actor
        return Member(actor, slot, actor.describe.remote(is_ready=True))

    def _create(self, role: str, slot: Slot | None, options: dict[str, Any], home: str = "") -> Member:
        """`home`: the node of a standby, else empty."""
        name = f"raylight:{self.label}:{role}"
        try:
            actor = RankActor.options(name=name, **options).remote(bool(home))
        except ValueError:  # the name is taken: by the one that this replaces, or by another driver's run
            actor = RankActor.options(name=f"{name}:{uuid.uuid4().hex[:6]}", **options).remote(bool(home))
        return Member(actor, slot, actor.describe.remote(), home=home)

    # ---- places

    def places(self, store_port: int, generation: int) -> list[Place]:
        """Of all members, which must be up. Ranks count up within a node; after a replacement elsewhere the ranks of a
        node may not be neighbours any more."""
        sites = [member.site for member in self.members]
        nodes = list(dict.fromkeys(site.node_id for site in sites))
        num_on: dict[str, int] = dict.fromkeys(nodes, 0)
        places = []
        for rank, site in enumerate(sites):
            place = Place(
                rank=rank,
                local_rank=num_on[site.node_id],
                node_rank=nodes.index(site.node_id),
                world_size=len(sites),
                num_nodes=len(nodes),
                node=site.host,
                store_host=sites[0].ip,
                store_port=store_port,
                device=self._device_of(self.members[rank]),
                generation=generation,
            )
            places.append(place)
            num_on[site.node_id] += 1
        return [
            replace(place, local_world_size=num_on[site.node_id]) for place, site in zip(places, sites, strict=True)
        ]

    def visible_gpus(self, member: Member) -> tuple[str, ...]:
        """The GPUs of all members on its node, in the order of local ranks: LOCAL_RANK is the device's number."""
        neighbours = [other for other in self.members if other.node_id == member.node_id]
        return tuple(dict.fromkeys(gpu for other in neighbours for gpu in other.gpu_ids)) if self._use_gpu else ()

    def _device_of(self, member: Member) -> str:
        return f"cuda:{self.visible_gpus(member).index(member.gpu_ids[0])}" if self._use_gpu else "cpu"


def describe_death(error: RayError) -> str:
    """The sentence of Ray's long text that says what happened."""
    text = str(error)
    if "failed to import on the worker" in text:
        node = re.search(r"\bip=([^,)]+)", text)
        return (
            f"{NO_RAYLIGHT} on node {node[1] if node else '?'} ({text.strip().splitlines()[-1]}). Install it there as "
            "on the driver's machine; cluster/README.md says how."
        )
    found = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", text, re.DOTALL)
    detail = (found[1] if found else text.strip().splitlines()[-1]).strip()
    if "connection error code 2" in detail:
        return "its process was killed or crashed (SIGKILL, out of memory, or a fault in native code)"
    return detail
