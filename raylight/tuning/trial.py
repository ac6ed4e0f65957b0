"""Trial: what Ray Tune runs. Its process is the driver of one trial's run, and keeps the workers for the next trial.

A process that Tune starts imports this before it knows what it is for: torch and all that needs it come later.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from ray import tune

from raylight.contract.errors import InvalidArguments
from raylight.contract.user_error import beside
from raylight.storage.filesystem import Storage
from raylight.tuning.trial_notes import Notes

if TYPE_CHECKING:
    from raylight.loading import Pointer
    from raylight.tuning.recipe import Recipe
    from raylight.tuning.trial_resources import Room
    from raylight.tuning.trial_run import TrialRun


Values = dict[str, object]
"""A configuration, or trainer arguments, by name."""


class Shipment:
    """A recipe on its way to the trials: in the object store once, its large tensors not pickled. With it go the
    environment variables and global settings that the caller has set."""

    def __init__(self, recipe: Recipe):
        import numpy as np

        from raylight.arguments.pickling import find_unpicklable
        from raylight.contract.process_settings import read_settings
        from raylight.launch import handover, ray_cluster

        self._environment, self._settings = ray_cluster.changed_environment(), read_settings()
        self.num_threads = os.environ.get("OMP_NUM_THREADS")
        try:
            payload, buffers = handover.dump(recipe)
        except Exception as error:
            roots = {"module_or_function": recipe.target, "data": recipe.data, **recipe.arguments}
            raise InvalidArguments(find_unpicklable(roots) or [str(error)]) from error
        self._payload: ray.ObjectRef[bytes] = ray.put(payload)
        self._buffers: ray.ObjectRef[Sequence[Any]] = ray.put(
            [np.frombuffer(buffer, dtype=np.uint8) for buffer in buffers]
        )

    def open(self, adopts: bool = False) -> Recipe:
        """A new recipe at each call, so that no trial sees what another has changed. `adopts`: in another process than
        the caller's, which is to know the classes of the script, and to have its global settings."""
        from raylight.contract.process_settings import apply_settings
        from raylight.launch import handover

        if adopts:
            apply_settings(self._settings)
        return handover.load(ray.get(self._payload), ray.get(self._buffers), adopts)

    def set_environment(self) -> None:
        """Here, and in the workers that this process starts."""
        from raylight.launch import ray_cluster

        ray_cluster.connect()  # what changes from now on goes to workers
        for name, value in self._environment.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


class Trial(tune.Trainable):
    """Subclassed by `raylight.sweep.trainable`. Each step is one result; between two, the workers stand still."""

    shipment: ClassVar[Shipment]
    run_storage: ClassVar[Storage]
    """The folder that holds the versions."""
    scale: ClassVar[Values]
    """The trainer arguments that say how much room a trial takes."""
    takes_scale_from_space: ClassVar[bool]
    metric: ClassVar[str | None]
    session: ClassVar[str]

    def __init__(self, config: Values | None = None, storage: Any = None):
        # Else relative paths in the user's code would lead into a folder of Tune's, another one for each trial.
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        super().__init__(config or {}, storage)

    @classmethod
    def plan_room(cls, config: Values) -> Room:
        from raylight.trainer import find_available
        from raylight.tuning.recipe import SCALE_ARGUMENTS
        from raylight.tuning.trial_resources import plan

        from_space = {key: config[key] for key in SCALE_ARGUMENTS if key in config and cls.takes_scale_from_space}
        arguments = cls.scale | from_space
        return plan(arguments, find_available(arguments))

    @classmethod
    def default_resource_request(cls, config: Values) -> tune.PlacementGroupFactory:
        room = cls.plan_room(config)
        return tune.PlacementGroupFactory(room.bundles(), strategy=room.strategy)

    # ---- what Tune calls

    def setup(self, config: Values) -> None:
        self.shipment.set_environment()
        self._values = config
        self._pointer: Pointer | None = None
        self._run: TrialRun | None = None

    def reset_config(self, new_config: Values) -> bool:
        """Another trial begins on this actor."""
        self._end_run()
        self._values, self._pointer = new_config, None
        return True

    def load_checkpoint(self, checkpoint: Any) -> None:
        from raylight.loading import Pointer

        self._end_run()
        self._pointer = Pointer.read(checkpoint)

    def step(self) -> dict[str, object]:
        notes = Notes(self.run_storage, self.trial_id)
        if self._run is None:
            notes.raise_again(self.session)
        try:
            if self._run is None:
                self._run = self._make_run(notes)
                self._run.begin(self._pointer)
            result = self._run.next_result()
        except Exception as error:
            with beside(error, "noting it for the sweep"):
                notes.write_error(error, self.session)
            raise
        if result is None:
            return {tune.result.RESULT_DUPLICATE: True, tune.result.DONE: True}
        return {**result, tune.result.DONE: self._run.is_done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pointer = self._run.point_to_checkpoint() if self._run is not None else self._pointer
        if pointer is not None:
            pointer.write(checkpoint_dir)

    def cleanup(self) -> None:
        if self._run is not None:
            from raylight.launch import ray_actors

            self._end_run()
            ray_actors.release_all()

    # ---- one run

    def _make_run(self, notes: Notes) -> TrialRun:
        from raylight.contract.seeding import seed_process
        from raylight.tuning.trial_run import TrialRun

        recipe = self.shipment.open(adopts=True)
        seed = recipe.trainer_arguments(self._values).get("seed", recipe.arguments.get("seed"))
        # Seeded for each trial: its first weights must not depend on what this process has trained before.
        seed_process(seed if seed is not None else int.from_bytes(os.urandom(4), "little"))
        made = recipe.make(self._values)
        resources = self.trial_resources
        if resources is None:
            raise InvalidArguments("a trial needs Ray Tune: pass raylight.sweep.trainable(...) to ray.tune.Tuner")
        room = self.plan_room(self._values).resized(resources.bundles)
        made.take_arguments(room.arguments())
        # Ray has set it for this process, which has no CPU of its own.
        os.environ["OMP_NUM_THREADS"] = self.shipment.num_threads or str(max(int(room.worker.get("CPU", 1)), 1))
        return TrialRun(made, self._values, self.trial_id, self.trial_name, notes, self.metric)

    def _end_run(self) -> None:
        if self._run is not None:
            self._run.end("stopped")
            self._run = None
