"""SavedCheckpoints: what is kept of a run, under the names of a ModelCheckpoint, for loggers that upload it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from raylight.contract.config import Checkpointing
from raylight.contract.kinds import Value
from raylight.contract.messages import FileWanted
from raylight.driver.shelf import Shelf
from raylight.storage.retention import DEFAULT_MONITOR, rank_measured


@dataclass
class SavedCheckpoints:
    """The attributes that `after_save_checkpoint` of a logger reads."""

    monitor: str | None
    mode: str
    save_top_k: int
    save_weights_only: bool
    save_last: bool = True
    state_key: str = "ModelCheckpoint"
    """The same for all that one callback has saved."""
    best_model_path: str = ""
    best_model_score: float | None = None
    last_model_path: str = ""
    current_score: float | None = None
    best_k_models: dict[str, float] = field(default_factory=dict)

    def read(self, shelf: Shelf) -> None:
        """Takes over what is on the shelf now."""
        name = self.monitor or DEFAULT_MONITOR
        best, last = shelf.best, shelf.last
        ranked = rank_measured(shelf.checkpoints, self.monitor, self.mode)
        kept = ranked if self.save_top_k == -1 else ranked[: self.save_top_k]
        self.best_k_models = {it.path: it.metrics[name] for it in kept if name in it.metrics}
        if best is not None:
            self.best_model_path, self.best_model_score = best.path, best.metrics.get(name)
        if last is not None:
            self.last_model_path, self.current_score = last.path, last.metrics.get(name)


def describe_saving(options: Checkpointing) -> SavedCheckpoints:
    return SavedCheckpoints(options.monitor, options.mode, options.keep_best, options.save_weights_only)


def describe_file(wanted: FileWanted) -> SavedCheckpoints:
    """Of a file that a ModelCheckpoint wanted which the driver does not know, such as one of `configure_callbacks`."""
    key, state = wanted.state or (wanted.path, {})
    saved = SavedCheckpoints(state.get("monitor"), "min", 1, wanted.weights_only, state_key=key)
    saved.last_model_path = saved.best_model_path = wanted.path
    for name in ("best_model_path", "best_model_score", "last_model_path", "current_score", "best_k_models"):
        if state.get(name):
            setattr(saved, name, state[name])
    return saved


def make_describer(callbacks: Iterable[Value]) -> Callable[[FileWanted], Value] | None:
    """Gives a ModelCheckpoint among `callbacks` as it was when it wanted a file; None if there is none."""
    owners = {callback.state_key: callback for callback in callbacks if hasattr(callback, "best_k_models")}

    def describe(wanted: FileWanted) -> Value:
        key, state = wanted.state or (next(iter(owners)), {})
        if key not in owners:
            return describe_file(wanted)
        owner = copy.copy(owners[key])
        vars(owner).update(state)
        return owner

    return describe if owners else None
