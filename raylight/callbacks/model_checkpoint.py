"""ModelCheckpoint: Lightning's way to say when checkpoints are made and which are kept."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raylight.callbacks.checkpoint import Checkpoint as CheckpointCallback
from raylight.callbacks.mistake_list import Mistakes, is_int
from raylight.contract.config import Checkpointing, FilePath
from raylight.contract.durations import Duration
from raylight.contract.plain_numbers import to_python
from raylight.storage.retention import rank_measured

if TYPE_CHECKING:
    from raylight.storage.checkpoints import Checkpoint
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


class ModelCheckpoint(CheckpointCallback):
    """Lightning's arguments for checkpoints; `checkpointing()` gives the trainer's `Checkpointing` that they mean.

    Checkpoints are made and kept by the driver, so on a worker this callback does nothing. After the run
    `best_model_path`, `best_model_score`, `last_model_path`, `best_k_models` (path to score), `kth_best_model_path`,
    `kth_value` and `current_score` say what was kept, as the trainer fills them in.

    What differs from Lightning 2.6:

    - Where checkpoints lie and how they are called is fixed, `<version>/checkpoints/step-00001200/`. `dirpath`,
      `filename`, `auto_insert_metric_name` and `enable_version_counter` are accepted and change nothing; the run says
      so once if one of the first two is set.
    - The newest checkpoint is always kept, as with `save_last=True`; `save_last="link"` means the same.
    - Without `monitor`, "val_loss" decides which is best if it is logged, else the newest is the best.
    - A checkpoint of an epoch is made after its validation, and if no interval is set a validation in the middle of
      an epoch makes one too; `save_on_train_epoch_end` changes nothing.
    - `save_on_exception` is on unless it is given as False.
    - `train_time_interval` is a timedelta, "DD:HH:MM:SS" or a dict such as {"hours": 2}.
    - `save_top_k=0` keeps the newest alone. To make none, pass `checkpoint=False` to the trainer; so `every_n_epochs=0`
      without another interval is an error.
    - One `ModelCheckpoint` a run.
    """

    def __init__(
        self,
        dirpath: FilePath | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | str | None = None,
        save_top_k: int = 1,
        save_on_exception: bool | None = None,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: Duration | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ):
        self.dirpath = dirpath
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = to_python(save_top_k)
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self.every_n_train_steps = to_python(every_n_train_steps)
        self.every_n_epochs = to_python(every_n_epochs)
        self.save_on_train_epoch_end = save_on_train_epoch_end
        self.enable_version_counter = enable_version_counter
        mistakes = Mistakes("ModelCheckpoint")
        self.train_time_interval = mistakes.read_duration("train_time_interval", train_time_interval)
        self._check_arguments(mistakes)
        self._begin()

    def _begin(self) -> None:
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.last_model_path = ""
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value: Tensor | None = None
        self.current_score: Tensor | None = None

    def _check_arguments(self, mistakes: Mistakes) -> None:
        mistakes.require_choice("mode", self.mode, ("min", "max"))
        mistakes.require_choice("save_last", self.save_last, (None, True, False, "link"))
        mistakes.require_count("save_top_k", self.save_top_k, -1)
        for name in ("every_n_train_steps", "every_n_epochs"):
            if getattr(self, name) is not None:
                mistakes.require_count(name, getattr(self, name), 0)
        interval = self.train_time_interval
        if interval is not None and interval < timedelta(0):
            mistakes.add(f"train_time_interval={interval!r} must not be negative.")
        given = [
            f"{name}={getattr(self, name)!r}"
            for name in ("every_n_train_steps", "every_n_epochs", "train_time_interval")
            if getattr(self, name)
        ]
        mistakes.require(len(given) < 2, f"{' and '.join(given)} exclude one another; keep one of them.")
        if self.every_n_epochs == 0 and not self.every_n_train_steps and interval is None:
            mistakes.add("every_n_epochs=0 makes no checkpoints; pass checkpoint=False to the trainer instead.")
        if self.monitor is None and is_int(self.save_top_k) and self.save_top_k > 1:
            mistakes.add(
                f"save_top_k={self.save_top_k} needs monitor= to tell which are best; "
                "without one it can be 1 (the newest), 0 (none) or -1 (all)."
            )
        mistakes.raise_any()

    @property
    def state_key(self) -> str:
        names = ("monitor", "mode", "every_n_train_steps", "every_n_epochs", "train_time_interval")
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def checkpointing(self) -> Checkpointing:
        """These arguments as the trainer's `Checkpointing`."""
        interval = self.train_time_interval
        return Checkpointing(
            every_n_steps=self.every_n_train_steps or None,
            every_n_epochs=self.every_n_epochs or None,
            every_s=None if interval is None else interval.total_seconds(),
            monitor=self.monitor,
            mode=self.mode,
            keep_best=self.save_top_k,
            keep_last=1,
            save_weights_only=self.save_weights_only,
            on_exception=self.save_on_exception is not False,
        )

    def notices(self) -> list[str]:
        """Sentences about arguments that are given and not used."""
        return [
            f"ModelCheckpoint({name}={str(value)!r}) is not used: checkpoints lie in <version>/checkpoints/step-N; "
            "best_model_path and last_model_path hold the paths."
            for name, value in (("dirpath", self.dirpath), ("filename", self.filename))
            if value is not None
        ]

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if stage != "fit":
            return
        self._begin()
        if trainer.is_global_zero:
            for text in self.notices():
                trainer.notice(text, "warning")

    def take_kept(self, checkpoints: Iterable[Checkpoint], best: Checkpoint | None, last: Checkpoint | None) -> None:
        """Take note of the checkpoints that the driver keeps, and of the best and the newest of them."""
        monitor, sign = self.monitor or "val_loss", -1.0 if self.mode == "max" else 1.0
        checkpoints = list(checkpoints)
        scores = {it.path: it.metrics[monitor] for it in checkpoints if monitor in it.metrics}
        ranked = [it.path for it in rank_measured(checkpoints, monitor, self.mode)]
        kept = sorted(scores, key=lambda path: sign * scores[path]) if self.save_top_k == -1 else ranked
        kept = kept if self.save_top_k == -1 else kept[: self.save_top_k]
        self.best_k_models = {path: torch.tensor(scores[path]) for path in kept}
        self.best_model_path = best.path if best is not None else ""
        self.last_model_path = last.path if last is not None else ""
        self.kth_best_model_path = kept[-1] if kept else ""
        self.best_model_score = self._score(scores, self.best_model_path)
        self.kth_value = self._score(scores, self.kth_best_model_path)
        self.current_score = self._score(scores, self.last_model_path)

    @staticmethod
    def _score(scores: dict[str, float], path: str) -> Tensor | None:
        return torch.tensor(scores[path]) if path in scores else None
