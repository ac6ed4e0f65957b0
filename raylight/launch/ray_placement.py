"""Placement: one placement group for the workers of a group, ranks side by side on each node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylight.contract.errors import NotEnoughResources
from raylight.launch import ray_cluster
from raylight.launch.ray_cluster import Resources


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one worker, whoever fills it."""

    group: PlacementGroup
    bundle: int

    @property
    def node_id(self) -> str:
        """The node that it is on now; empty while its node is gone and Ray looks for another."""
        return _bundle_nodes(self.group).get(self.bundle, "")

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, self.bundle)


class Placement:
    """The slots of a group of workers, reserved together or not at all."""

    def __init__(self, worker: Resources, strategy: str):
        self.worker, self.strategy = dict(worker), strategy
        self._around = ray.util.get_current_placement_group()
        self._owned: list[PlacementGroup] = []

    @property
    def is_given(self) -> bool:
        """Whether this process is inside a placement group, as a trial of a sweep is, with room for its workers."""
        return self._around is not None

    def reserve(
        self,
        num_workers: int,
        tell: Callable[[str], object] | None = None,
        make_room: Callable[[], object] = lambda: None,
    ) -> list[Slot]:
        """In the order of the ranks: the driver's node first, nodes one after the other. Waits for what is in use, and
        calls `make_room` while it does.

        Inside a placement group the workers take its last bundles, and so never wait for what another trial holds.
        """
        if self._around is not None:
            bundles = _last_bundles(self._around, num_workers, self.worker)
            return _order([Slot(self._around, bundle) for bundle in bundles])
        group = self._create(num_workers)
        growth = ray_cluster.Growth(num_workers, self.worker, self.strategy)

        def is_placed(timeout_s: float) -> bool:
            if group.wait(timeout_s):
                return True
            make_room()
            growth.check()
            return False

        ray_cluster.wait_for(is_placed, lambda: ray_cluster.describe_wait(num_workers, self.worker), tell)
        return _order([Slot(group, bundle) for bundle in range(num_workers)])

    def extend(self) -> Slot:
        """Room for one more worker, which may come later: an actor in it waits until it is there."""
        return Slot(self._create(1), 0)

    def give_back(self, slot: Slot) -> None:
        """Ends the reservation of a slot that `extend` made; one that was reserved with others stays theirs."""
        if slot.group in self._owned and slot.group.bundle_count == 1:
            self._owned.remove(slot.group)
            remove_placement_group(slot.group)

    def remove(self) -> None:
        """Gives everything back that was reserved here."""
        for group in self._owned:
            remove_placement_group(group)
        self._owned.clear()

    def actor_options(self) -> dict[str, Any]:
        """The resources that an actor takes of its slot."""
        own_words = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        options: dict[str, Any] = {own_words[name]: amount for name, amount in self.worker.items() if name in own_words}
        others = {name: amount for name, amount in self.worker.items() if name not in own_words}
        return {"num_cpus": 0} | options | ({"resources": others} if others else {})

    def _create(self, num_workers: int) -> PlacementGroup:
        bundle = {name: amount for name, amount in self.worker.items() if amount > 0}
        group = placement_group([dict(bundle) for _ in range(num_workers)], strategy=self.strategy)
        self._owned.append(group)
        return group


def _last_bundles(group: PlacementGroup, num_workers: int, worker: Resources) -> range:
    specs = group.bundle_specs
    first = len(specs) - num_workers
    taken = specs[max(first, 0) :]
    if first < 0 or any(spec.get(name, 0.0) < amount for spec in taken for name, amount in worker.items()):
        raise NotEnoughResources(
            f"asked for {num_workers} workers with {dict(worker)} each inside a placement group whose bundles are "
            f"{specs}: make one bundle for each worker, after those of the driver."
        )
    return range(first, len(specs))


def _order(slots: list[Slot]) -> list[Slot]:
    nodes = _bundle_nodes(slots[0].group)
    here = ray.get_runtime_context().get_node_id()
    first_bundle: dict[str, int] = {}
    for slot in slots:
        first_bundle.setdefault(nodes[slot.bundle], slot.bundle)

    def rank_key(slot: Slot) -> tuple:
        node = nodes[slot.bundle]
        return node != here, first_bundle[node], slot.bundle

    return sorted(slots, key=rank_key)


def _bundle_nodes(group: PlacementGroup) -> dict[int, str]:
    return placement_group_table(group)["bundles_to_node_id"]
