"""Groups of workers on Ray that are kept from one fit to the next: that is worth more than all else at start-up."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from raylight.contract.config import Config
from raylight.launch import ray_cluster
from raylight.launch.ray_cluster import Cluster, connect, describe_cluster
from raylight.launch.ray_group import Entry, RayGroup
from raylight.launch.ray_local import session_name

__all__ = ["Cluster", "RayGroup", "acquire_group", "connect", "describe_cluster", "release_all"]

_kept: list[tuple[tuple, RayGroup]] = []
_lock = threading.Lock()


def acquire_group(
    config: Config,
    num_workers: int | None = None,
    use_gpu: bool | None = None,
    resources_per_worker: dict[str, float] | None = None,
    placement: str | None = None,
    label: Callable[[], str] | None = None,
    num_standby: int | None = None,
    entry: Entry = "raylight.worker.task_runner:run",
    tell: Callable[[str], object] | None = None,
) -> RayGroup:
    """A group for one run, as `config` says if an argument is None: one that an earlier run has left, with its dead
    members replaced, or a new one.

    It can be had again once its run has ended or was halted. Groups that lie idle give way to one of another shape
    if there is no room for both. `label` says what new actors are called, None: the run's name; it is asked once
    there is room for them. `tell` hears what is waited for, if anything. Connects to Ray, or starts it. Raises
    NotEnoughResources before any actor is made.
    """
    changes: dict[str, Any] = {
        "num_workers": num_workers,
        "use_gpu": use_gpu,
        "resources_per_worker": resources_per_worker,
        "num_standby": num_standby,
    }
    config = replace(config, **{name: value for name, value in changes.items() if value is not None})
    _restart_outgrown_ray(config)
    cluster = connect(config)
    use_gpu = config.use_gpu if config.use_gpu is not None else cluster.num_gpus > 0
    needs = {"CPU": 1.0} | ({"GPU": 1.0} if use_gpu else {}) | config.resources_per_worker
    placement = placement or config.strategy.placement
    num_workers = _count_workers(config.num_workers, cluster, needs, placement)
    asked = config.num_workers if isinstance(config.num_workers, tuple) else num_workers
    num_standby = 1 if config.num_standby is None else config.num_standby
    around = ray.util.get_current_placement_group()
    key = (
        session_name(), around.id if around is not None else None, asked, use_gpu, placement,
        tuple(sorted(needs.items())), num_standby,
    )  # fmt: skip
    group = _take_kept(key)
    if group is None:
        if not ray_cluster.has_room_now(num_workers, needs):
            _release_idle()
        group = RayGroup.start(
            config, num_workers, use_gpu, needs, placement, label, num_standby, tell, make_room=_release_idle
        )
        with _lock:
            _kept.append((key, group))
    group.run_by(entry)
    return group


def release_all() -> None:
    """Ends every group, leaving no actor, process or placement group. Done at exit."""
    with _lock:
        groups = [group for _, group in _kept]
        _kept.clear()
    if ray.is_initialized():
        for group in groups:
            group.shutdown()


atexit.register(release_all)


def _restart_outgrown_ray(config: Config) -> None:
    with _lock:
        is_in_use = any(group.in_use for _, group in _kept)
    if not is_in_use and ray_cluster.is_outgrown(config):
        release_all()
        ray_cluster.disconnect()


def _take_kept(key: tuple) -> RayGroup | None:
    """A group of that shape that lies idle. Those of a Ray that is gone are forgotten."""
    with _lock:
        _kept[:] = [(kept_key, group) for kept_key, group in _kept if kept_key[0] == key[0]]
        found = next((group for kept_key, group in _kept if kept_key == key and not group.in_use), None)
        if found is not None:
            found.claim()
    if found is not None and not found.renew():
        _release(found)
        return None
    return found


def _release_idle() -> None:
    with _lock:
        idle = [group for _, group in _kept if not group.in_use]
    for group in idle:
        _release(group)


def _release(group: RayGroup) -> None:
    with _lock:
        _kept[:] = [(key, kept) for key, kept in _kept if kept is not group]
    group.shutdown()


def _count_workers(
    asked: int | str | tuple[int, int], cluster: Cluster, needs: dict[str, float], placement: str
) -> int:
    """Of an elastic group as many as there is room for; of "auto" one for each GPU."""
    if isinstance(asked, tuple):
        fitting = ray_cluster.count_fitting(ray_cluster.node_resources(), needs, placement)
        return min(max(fitting, asked[0]), asked[1])
    if isinstance(asked, str):
        return max(1, int(cluster.num_gpus / needs.get("GPU", 1.0)))
    return asked
