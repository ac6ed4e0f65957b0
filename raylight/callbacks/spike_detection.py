"""SpikeDetection: ends a run whose loss leaps, and notes the batches to leave out of the next."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raylight.callbacks.mistake_list import Mistakes
from raylight.contract.kinds import Batch, Output, Value
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.contract.config import Config, FilePath
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames

FILE = "skip_batches.json"


class TrainingSpikeException(RuntimeError):
    """The loss of a batch was a spike."""

    def __init__(self, batch_idx: int):
        super().__init__(f"Training spike detected in batch {batch_idx}")
        self.batch_idx = batch_idx

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.batch_idx,)


class SpikeDetection(Callback):
    """Raises TrainingSpikeException where a loss is worse than the one before, and away from the mean of the last
    `window` by `atol` or more and by `rtol` times that mean or more.

    `mode` "min": lower is better. The first `warmup` batches of an epoch are not judged. With `finite_only`, a loss
    that is not finite is a spike too. Before it raises, it writes the numbers of this batch and of the one before to
    `exclude_batches_path`, a `.json` file or a folder for `skip_batches.json` (by default the trainer's
    `default_root_dir`). Each worker judges its own losses, and the first spike of any of them ends the run. Reads each
    loss from the device.
    """

    def __init__(
        self,
        mode: str = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: FilePath | None = None,
        finite_only: bool = True,
    ):
        mistakes = Mistakes(type(self).__name__)
        mistakes.require_choice("mode", mode, ("min", "max"))
        mistakes.require_count("window", window, 1)
        mistakes.require_count("warmup", warmup, 0)
        for name, value in (("atol", atol), ("rtol", rtol)):
            if value is not None:
                mistakes.require_number(name, value)
        mistakes.raise_any()
        self.mode, self.window, self.warmup = mode, window, warmup
        self.atol, self.rtol = atol, rtol
        self.exclude_batches_path = exclude_batches_path
        self.finite_only = finite_only
        self.bad_batches: list[int] = []
        self.last_val = 0.0
        self.recent: deque[float] = deque(maxlen=window)

    def _find_mistakes(self, config: Config) -> list[str]:
        path = str(self.exclude_batches_path if self.exclude_batches_path is not None else config.storage_path)
        if "://" not in path:
            return []
        return [f"SpikeDetection writes a local file, and {path} is a URI: pass exclude_batches_path=, a path here."]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: TrainerNames, module: Module, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        loss = _read_loss(outputs)
        if batch_idx >= self.warmup and self._is_spike(loss):
            self._note(Path(self.exclude_batches_path or trainer.default_root_dir), batch_idx)
            raise TrainingSpikeException(batch_idx)
        if self.finite_only or math.isfinite(loss):
            self.recent.append(loss)
            self.last_val = loss

    def _is_spike(self, loss: float) -> bool:
        if self.finite_only and not math.isfinite(loss):
            return True
        if loss <= self.last_val if self.mode == "min" else loss >= self.last_val:
            return False
        if not self.recent:
            return False
        mean = sum(self.recent) / len(self.recent)
        distance = abs(loss - mean)
        return (self.atol is None or distance >= abs(self.atol)) and (
            self.rtol is None or distance >= abs(self.rtol * mean)
        )

    def _note(self, path: Path, batch_idx: int) -> None:
        """Writes all bad batches so far."""
        self.bad_batches += [batch_idx - 1, batch_idx]  # the one before may have spoilt the weights
        file = path if path.suffix == ".json" else path / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.part")
        aside.write_text(json.dumps(self.bad_batches, indent=4))
        aside.replace(file)

    def state_dict(self) -> dict[str, Value]:
        return {"last_val": self.last_val, "recent": list(self.recent), "bad_batches": list(self.bad_batches)}

    def load_state_dict(self, state_dict: dict[str, Value]) -> None:
        self.last_val = state_dict["last_val"]
        self.bad_batches = list(state_dict["bad_batches"])
        self.recent = deque(state_dict["recent"], maxlen=self.window)


def _read_loss(outputs: Output) -> float:
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"SpikeDetection needs the loss of each batch, and training_step returned {type(loss).__name__}"
        )
    return float(loss)
