"""What user code finds on a worker's `trainer` under the names that Lightning's Trainer has for it."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor

_INSTEAD = {  # what user code may ask Lightning's Trainer for, and does otherwise here
    "save_checkpoint": "trainer.request_checkpoint() saves at the end of this step",
    "state": "trainer.training, .validating, .testing, .predicting and .sanity_checking say what is running",
    "fit_loop": "trainer.current_epoch, .batch_idx and .should_stop say where the run is",
}


class TrainerNames:
    """The part of `Rank` that says where it stands and what it was told to do."""

    @property
    def lightning_module(self) -> Any:
        return self.module

    model = lightning_module

    @property
    def loggers(self) -> list[Any]:
        return [self.logger] if self.logger else []

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def global_rank(self) -> int:
        return self.place.rank

    @property
    def local_rank(self) -> int:
        return self.place.local_rank

    @property
    def node_rank(self) -> int:
        return self.place.node_rank

    @property
    def num_nodes(self) -> int:
        return self.place.num_nodes

    @property
    def is_global_zero(self) -> bool:
        return self.place.rank == 0

    @property
    def attempt(self) -> int:
        return self.task.attempt

    @property
    def seed(self) -> int:
        return self.task.seed

    @property
    def log_dir(self) -> str:
        return self.task.version_path

    @property
    def default_root_dir(self) -> str:
        return self.config.storage_path

    @property
    def precision(self) -> str:
        name: str = self.precision_plugin.name
        return name

    @property
    def max_epochs(self) -> int | None:
        return self.config.max_epochs

    @property
    def max_steps(self) -> int:
        return self.config.max_steps

    @property
    def log_every_n_steps(self) -> int:
        return self.config.log_every_n_steps

    @property
    def fast_dev_run(self) -> bool | int:
        return self.config.fast_dev_run

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch in hand is the last of the epoch of training."""
        return self.batch is not None and self.batch.last

    @property
    def strategy(self) -> Any:
        """For code that asks Lightning's strategy: `barrier`, `broadcast`, `all_gather`, `reduce` and the ranks."""
        return self

    @property
    def root_device(self) -> torch.device:
        return self.device

    @property
    def early_stopping_callback(self) -> Any:
        return self._find_callback("EarlyStopping")

    @property
    def checkpoint_callback(self) -> Any:
        return self._find_callback("ModelCheckpoint")

    def _find_callback(self, kind: str) -> Any:
        return next((c for c in self.callbacks if any(k.__name__ == kind for k in type(c).__mro__)), None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if hasattr(type(self), name):  # a property that failed: again, for the error of its own
            return object.__getattribute__(self, name)
        known = [attribute for attribute in {*dir(type(self)), *self.__dict__} if not attribute.startswith("_")]
        near = difflib.get_close_matches(name, known, 1)
        hint = _INSTEAD.get(name) or (f"did you mean {near[0]!r}?" if near else "")
        raise AttributeError(f"the trainer of a worker has no attribute {name!r}" + (f"; {hint}" if hint else ""))

    @property
    def training(self) -> bool:
        return self.stage == "train"

    @property
    def validating(self) -> bool:
        return self.stage == "validate"

    @property
    def testing(self) -> bool:
        return self.stage == "test"

    @property
    def predicting(self) -> bool:
        return self.stage == "predict"

    @property
    def sanity_checking(self) -> bool:
        return self.stage == "sanity"

    @property
    def fitting(self) -> bool:
        return self.task.stage == "fit"

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Newest value of everything logged. Epoch values are equal on all ranks; a step value is this rank's own
        until the epoch ends. Reading it waits for the device."""
        return {name: torch.tensor(value) for name, value in self.metrics.newest().items()}

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self.metrics.logged_values.items()}

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        return self.metrics.shown()

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that the whole fit will make; `inf` where the data or the run has no end."""
        config, batches = self.config, self.num_training_batches
        if self.train_batches is None:
            from raylight.worker.loop import open_training_data

            rank: Any = self
            open_training_data(rank)
            batches = self.num_training_batches
        if config.max_epochs == -1 or config.max_epochs is None or batches is None:
            return config.max_steps if config.max_steps != -1 else float("inf")
        steps = -(-batches // self.accumulate_grad_batches) * max(config.max_epochs, 1)
        return min(steps, config.max_steps) if config.max_steps != -1 else steps
