"""Trial: what Ray Tune runs. Its process is the driver of one trial's run, and keeps the workers for the next trial."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import ray
from ray import tune

from raylight.errors import InvalidArguments
from raylight.launch import handover, ray_actors
from raylight.loading import Pointer
from raylight.seeding import seed_process
from raylight.trainer import find_available
from raylight.tuning.recipe import SCALE_ARGUMENTS, Recipe
from raylight.tuning.room import Room, plan
from raylight.tuning.trial_run import Identity, TrialRun


class Shipment:
    """A recipe on its way to the trials: in the object store once, its large tensors not pickled."""

    def __init__(self, recipe: Recipe):
        import numpy as np

        payload, buffers = handover.dump(recipe)
        self._payload: Any = ray.put(payload)
        self._buffers: Any = ray.put([np.frombuffer(buffer, dtype=np.uint8) for buffer in buffers])

    def open(self) -> Recipe:
        """Anew at each call, so that no trial sees what another has changed."""
        return handover.load(ray.get(self._payload), ray.get(self._buffers))


class Trial(tune.Trainable):
    """Subclassed by `raylight.sweep.trainable`. Each step is one result; between two, the workers stand still."""

    shipment: ClassVar[Shipment]
    scale: ClassVar[dict[str, Any]]
    """Those trainer arguments that say how much room a trial takes."""
    takes_scale_from_space: ClassVar[bool]
    metric: ClassVar[str | None]
    session: ClassVar[str]

    def __init__(self, config: dict[str, Any] | None = None, storage: Any = None):
        # Else relative paths in the user's code would lead into a folder of Tune's, another one for each trial.
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        super().__init__(config or {}, storage)

    @classmethod
    def plan_room(cls, config: dict[str, Any]) -> Room:
        from_space = {key: config[key] for key in SCALE_ARGUMENTS if key in config and cls.takes_scale_from_space}
        arguments = cls.scale | from_space
        return plan(arguments, find_available(arguments))

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        room = cls.plan_room(config)
        return tune.PlacementGroupFactory(room.bundles(), strategy=room.strategy)

    # ---- what Tune calls

    def setup(self, config: dict[str, Any]) -> None:
        self._values = config
        self._pointer: Pointer | None = None
        self._run: TrialRun | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial begins on this actor."""
        self._end_run()
        self._values, self._pointer = new_config, None
        return True

    def load_checkpoint(self, checkpoint: Any) -> None:
        self._end_run()
        self._pointer = Pointer.read(checkpoint)

    def step(self) -> dict[str, Any]:
        if self._run is None:
            self._run = self._make_run()
            self._run.begin(self._pointer)
        result = self._run.next_result()
        if result is None:
            return {tune.result.RESULT_DUPLICATE: True, tune.result.DONE: True}
        return {**result, tune.result.DONE: self._run.is_done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pointer = self._run.point_to_checkpoint() if self._run is not None else self._pointer
        if pointer is not None:
            pointer.write(checkpoint_dir)

    def cleanup(self) -> None:
        self._end_run()
        ray_actors.release_all()

    # ---- one run

    def _make_run(self) -> TrialRun:
        recipe = self.shipment.open()
        seed = recipe.trainer_arguments(self._values).get("seed", recipe.arguments.get("seed"))
        # Each trial anew: its first weights must not depend on what this process has trained before.
        seed_process(seed if seed is not None else int.from_bytes(os.urandom(4), "little"))
        made = recipe.make(self._values)
        resources = self.trial_resources
        if resources is None:
            raise InvalidArguments("a trial needs Ray Tune: pass raylight.sweep.trainable(...) to ray.tune.Tuner")
        made.arguments |= self.plan_room(self._values).resized(resources.bundles).arguments()
        return TrialRun(made, self._values, Identity(self.trial_id, self.trial_name, self.session, self.metric))

    def _end_run(self) -> None:
        if self._run is not None:
            self._run.end("stopped")
            self._run = None
