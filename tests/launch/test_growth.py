"""When a run that waits for nodes gives up: an autoscaler has had its time, and nothing is going to become free."""

from __future__ import annotations

from typing import Any

import pytest

from raylight.contract.errors import NotEnoughResources
from raylight.launch import ray_cluster
from raylight.launch.ray_cluster import GROWTH_PATIENCE_S, Growth


class World:
    """A cluster of one node with two CPUs, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now, self.free, self.starting = 0.0, 2.0, 0
        self.growth = Growth(3, {"CPU": 1.0}, "PACK", lambda: self.now)

    def check_at(self, now: float) -> None:
        self.now = now
        self.growth.check()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    answers: dict[str, Any] = {
        "node_resources": lambda: [{"CPU": 2.0}],
        "count_starting_nodes": lambda: world.starting,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(ray_cluster, name, answer)
    monkeypatch.setattr(ray_cluster.ray, "available_resources", lambda: {"CPU": world.free})
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": 2.0})
    return world


def test_an_autoscaler_that_starts_nothing_is_given_its_time(world: World) -> None:
    world.check_at(100.0)
    world.check_at(99.0 + GROWTH_PATIENCE_S)
    with pytest.raises(NotEnoughResources, match=r"asked for 3 workers with 1 CPU each \(PACK\).* room for 2, and its"):
        world.check_at(100.0 + GROWTH_PATIENCE_S)


@pytest.mark.parametrize("change", [{"starting": 1}, {"free": 1.0}])
def test_nodes_that_start_and_workers_that_may_end_are_waited_for(change: dict[str, Any], world: World) -> None:
    world.check_at(0.0)
    vars(world).update(change)
    world.check_at(1000.0)
    vars(world).update({"starting": 0, "free": 2.0})
    world.check_at(1001.0)  # its time begins anew
    with pytest.raises(NotEnoughResources):
        world.check_at(1001.0 + GROWTH_PATIENCE_S)
