"""Result: what `fit` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raylight.driver.journal import read_metrics

if TYPE_CHECKING:
    import pyarrow as pa

    from raylight.storage.checkpoints import Checkpoint
    from raylight.storage.versions import Version


@dataclass(frozen=True, slots=True)
class Result:
    """How a fit ended.

    `status` is "finished", "stopped" (by a callback or a time limit) or "interrupted" (Ctrl-C or SIGTERM);
    `metrics` has the final value of everything logged; `path` is the version directory, None if nothing was
    written; `goodput` says in seconds what the time went to.
    """

    status: str
    metrics: dict[str, float]
    path: str | None
    best_checkpoint: Checkpoint | None
    last_checkpoint: Checkpoint | None
    checkpoints: list[Checkpoint]
    num_steps: int
    num_epochs: int
    num_restarts: int = 0
    goodput: dict[str, float] = field(default_factory=dict)
    version: Version | None = field(default=None, repr=False)

    def history(self) -> pa.Table:
        """Every logged value as a table with the columns step, epoch, name, value and time."""
        if self.version is None:
            raise ValueError("this run wrote nothing (fast_dev_run), so there is no history")
        return read_metrics(self.version.storage)

    def as_dict(self) -> dict[str, object]:
        """For printing and for JSON."""
        checkpoints = {"best_checkpoint": self.best_checkpoint, "last_checkpoint": self.last_checkpoint}
        return {
            "status": self.status, "path": self.path, "num_steps": self.num_steps, "num_epochs": self.num_epochs,
            "num_restarts": self.num_restarts, "metrics": self.metrics,
            **{name: c.path if c else None for name, c in checkpoints.items()},
        }  # fmt: skip
