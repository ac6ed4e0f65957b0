"""Room: what a trial takes of the cluster, its driver and its workers together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray.tune.search.sample import Categorical, Domain, Integer

from raylight.arguments.resolving import resolve
from raylight.arguments.scale import Available
from raylight.contract.errors import InvalidArguments
from raylight.tuning.recipe import LIGHTNINGS_SCALE, SCALE_ARGUMENTS

Bundle = dict[str, float]


@dataclass(frozen=True, slots=True)
class Room:
    """Of `num_workers=0` one bundle, in which the trial itself trains; else one for each worker, and the driver, which
    mostly waits, takes nothing."""

    num_workers: int
    use_gpu: bool
    worker: Bundle
    strategy: str = "PACK"

    def bundles(self) -> list[Bundle]:
        """The driver's first, as Tune wants it."""
        return [{}, *(dict(self.worker) for _ in range(self.num_workers))] if self.num_workers else [dict(self.worker)]

    def resized(self, bundles: list[Bundle]) -> Room:
        """The same for what the trial really got: a scheduler may have changed it. `bundles` without an empty head."""
        if not self.num_workers:
            return replace(self, worker=bundles[0])
        if any(bundle != bundles[0] for bundle in bundles):
            raise InvalidArguments(
                f"this trial got the bundles {bundles}: give it an empty one for its driver, then one of the same size "
                f"for each worker, as in tune.PlacementGroupFactory({self.bundles()})"
            )
        return replace(self, num_workers=len(bundles), worker=bundles[0])

    def arguments(self) -> dict[str, object]:
        """As the trainer takes them, in place of all that was said of it."""
        own = {"num_workers": self.num_workers, "use_gpu": self.use_gpu, "resources_per_worker": dict(self.worker)}
        return dict.fromkeys(LIGHTNINGS_SCALE) | own


def plan(arguments: Mapping[str, object], available: Available) -> Room:
    """From the trainer's arguments. A trial has no workers of its own if nothing is said of them.

    Raises InvalidArguments, and NotEnoughResources if a trial asks for more than the whole cluster has.
    """
    given = {name: value for name, value in arguments.items() if name in SCALE_ARGUMENTS and value is not None}
    if isinstance(given.get("num_workers"), (tuple, list)):
        raise InvalidArguments(
            f"num_workers={given['num_workers']}: the workers of a trial are reserved together, so say one number; "
            "Tune's ResourceChangingScheduler changes it while trials run"
        )
    has_gpus = bool(available.gpus)
    says_how_many = any(name in given for name in ("num_workers", "devices", "gpus"))
    config = resolve(given if says_how_many else {**given, "num_workers": 0}, available)
    if config.num_workers == 0:
        is_for_cpus = given.get("accelerator") == "cpu" or given.get("gpus") == 0
        use_gpu = bool(given.get("use_gpu", not is_for_cpus and (has_gpus or available.num_gpus_here > 0)))
        worker = {"CPU": 1.0} | ({"GPU": 1.0} if use_gpu else {}) | config.resources_per_worker
        return Room(0, use_gpu, worker)
    # "auto" is not known before someone has connected to the cluster; then it is what fits.
    num_workers = config.num_workers if isinstance(config.num_workers, int) else 1
    worker = {name: amount for name, amount in config.resources_per_worker.items() if amount}
    return Room(num_workers, bool(config.use_gpu), worker, config.strategy.placement)


def listed_scales(space: Mapping[str, object]) -> list[dict[str, object]]:
    """All combinations of the values in the space that say how much room a trial takes; of a range of numbers the
    largest. Values that only Tune's draws show are left out."""
    listed = {name: _listed(space[name]) for name in SCALE_ARGUMENTS if name in space}
    known = {name: values for name, values in listed.items() if values}
    return [dict(zip(known, values, strict=True)) for values in itertools.product(*known.values())]


def _listed(value: object) -> list[object]:
    if isinstance(value, Categorical):
        return list(value.categories)
    if isinstance(value, Integer):
        return [value.upper - 1]
    if isinstance(value, Mapping) and list(value) == ["grid_search"]:
        return list(value["grid_search"])
    return [] if isinstance(value, Domain) else [value]
