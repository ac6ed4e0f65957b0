"""The nodes of workers that are about to begin, compared with the driver's machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from raylight.contract.errors import ClusterError
from raylight.launch.node_checks import Node, Record, check_nodes, check_storage, find_versions
from raylight.launch.ray_roster import NO_RAYLIGHT, Member

ANSWER_TIMEOUT_S = 60.0
"""How long a node may take to read one small file; a mount whose server is gone never comes back."""


class Inspection:
    """Asks one worker on each node other than the driver's; the answers come while the workers import torch."""

    def __init__(self, members: Sequence[Member], record: Record | None):
        """`record`: what all nodes are to see; None: do not look."""
        here = ray.get_runtime_context().get_node_id()
        self._members: dict[str, Member] = {}
        self._failed = [member.death for member in members if not member.visit() and NO_RAYLIGHT in member.death]
        for member in members:
            if not member.is_dead and member.node_id != here:
                self._members.setdefault(member.node_id, member)
        self._path = record.path if record is not None else ""
        self._views = {}
        if record is not None:
            self._views = {node: one.actor.look_for.remote(record) for node, one in self._members.items()}

    def finish(self) -> None:
        """Raises ClusterError or StorageError, naming the nodes, if something is wrong with them."""
        if self._failed:
            raise ClusterError("\n".join(sorted(set(self._failed))))
        if self._members:
            nodes = [_describe(member) for member in self._members.values()]
            check_nodes(nodes, find_versions())
            check_storage({_name(self._members[node]): _answer(view) for node, view in self._views.items()}, self._path)


def _describe(member: Member) -> Node:
    site = member.site
    return Node(_name(member), site.versions, site.clock, member.asked_at, time.time())


def _name(member: Member) -> str:
    return f"{member.site.host} ({member.site.ip})"


def _answer(view: ray.ObjectRef[str]) -> str:
    try:
        return ray.get(view, timeout=ANSWER_TIMEOUT_S)
    except GetTimeoutError:
        return f"reading it takes more than {ANSWER_TIMEOUT_S:g} s"
    except RayActorError:
        return ""  # the worker's death is reported for itself
