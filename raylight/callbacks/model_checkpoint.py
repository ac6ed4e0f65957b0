"""ModelCheckpoint: Lightning's files of the best and the newest state."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raylight.arguments.checks import say_unknown_metric
from raylight.callbacks.checkpoint_files import Candidates, CheckpointFiles, absolute
from raylight.callbacks.checkpoint_names import join_path
from raylight.callbacks.mistake_list import Mistakes, is_int
from raylight.contract.config import Checkpointing, FilePath
from raylight.contract.durations import Duration
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Batch, Output, Value
from raylight.contract.layout import CHECKPOINTS
from raylight.contract.plain_numbers import to_python
from raylight.storage.filesystem import Storage
from raylight.storage.retention import DEFAULT_MONITOR

if TYPE_CHECKING:
    from raylight.contract.config import Config
    from raylight.storage.checkpoints import Checkpoint
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


class ModelCheckpoint(CheckpointFiles):
    """Writes `.ckpt` files as Lightning's ModelCheckpoint does: arguments, names, defaults and attributes are those of
    Lightning 2.6. A run may have several.

    The files lie in `dirpath`, a path or a URI; by default in `<version>/checkpoints`, beside the folders of raylight's
    own checkpoints, which are made at the same steps and which `resume="last"` goes on from. A file is made of such a
    checkpoint while training goes on, appears whole or not at all, and is there when `fit` returns. `best_model_path`,
    `last_model_path` and `best_k_models` name it as soon as it is decided on.

    What differs from Lightning 2.6:

    - A hook that reads a file while training goes on may come too early. A subclass that overrides `_save_checkpoint`
      gets each file written before the call returns, and training waits for it as it does in Lightning.
    - `train_time_interval` is a timedelta, "DD:HH:MM:SS" or a dict such as {"hours": 2}.
    - With several workers rank 0's values decide, as a value of a step is each rank's own.
    - In manual optimization the weights are those after the step, whatever the module keeps in `saved_models`.
    """

    _judges_values = True
    _comes_last = True

    def __init__(
        self,
        dirpath: FilePath | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | str | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: Duration | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ):
        self.dirpath: str | None = absolute(dirpath) if dirpath else None
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = to_python(save_top_k)
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter
        self._found_dirpath: str | None = None  # of the version that the run before wrote
        mistakes = Mistakes("ModelCheckpoint")
        self._train_time_interval = mistakes.read_duration("train_time_interval", train_time_interval)
        is_by_epoch = every_n_train_steps is None and train_time_interval is None and every_n_epochs is None
        self._every_n_train_steps: int = to_python(every_n_train_steps) or 0
        self._every_n_epochs: int = 1 if is_by_epoch else to_python(every_n_epochs) or 0
        self._check_arguments(mistakes)
        self._begin()

    def _begin(self) -> None:
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.last_model_path = ""
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value = torch.tensor(float("inf") if self.mode == "min" else float("-inf"))
        self.current_score: Tensor | None = None
        self._last_global_step_saved = 0  # before the first step there is nothing to save
        self._last_checkpoint_saved = ""
        self._last_time_checked: float | None = None
        self._other_dirpath: str | None = None  # of the checkpoint that the run goes on from
        self._waits_for_validation = False  # a file was due, and the monitored value was not there yet
        self._has_validated = self._has_said_unknown = False

    def _check_arguments(self, mistakes: Mistakes) -> None:
        mistakes.require_choice("mode", self.mode, ("min", "max"))
        mistakes.require_choice("save_last", self.save_last, (None, True, False, "link"))
        mistakes.require_count("save_top_k", self.save_top_k, -1)
        given = {"every_n_train_steps": self._every_n_train_steps, "every_n_epochs": self._every_n_epochs}
        for name, value in given.items():
            mistakes.require_count(name, value, 0)
        interval = self._train_time_interval
        if interval is not None and interval < timedelta(0):
            mistakes.add(f"train_time_interval={interval!r} must not be negative.")
        set_ones = [f"{name}={value!r}" for name, value in given.items() if value]
        set_ones += [f"train_time_interval={interval!r}"] if interval is not None else []
        mistakes.require(len(set_ones) < 2, f"{' and '.join(set_ones)} exclude one another; keep one of them.")
        if self.monitor is None and is_int(self.save_top_k) and self.save_top_k > 1:
            mistakes.add(
                f"save_top_k={self.save_top_k} needs monitor= to tell which are best; "
                "without one it can be 1 (the newest), 0 (none) or -1 (all)."
            )
        if self.save_last == "link" and self.dirpath is not None and "://" in self.dirpath:
            mistakes.add(f"save_last='link' needs a local directory, not dirpath={self.dirpath!r}; use save_last=True.")
        mistakes.raise_any()

    def _find_mistakes(self, config: Config) -> list[str]:
        if self.save_last == "link" and self.dirpath is None and "://" in config.storage_path:
            return [
                f"ModelCheckpoint: save_last='link' needs a local directory, not storage_path={config.storage_path!r}; "
                "pass dirpath=, or save_last=True."
            ]
        return []

    @property
    def every_n_epochs(self) -> int:
        return self._every_n_epochs

    @property
    def state_key(self) -> str:
        options = {
            "monitor": self.monitor,
            "mode": self.mode,
            "every_n_train_steps": self._every_n_train_steps,
            "every_n_epochs": self._every_n_epochs,
            "train_time_interval": self._train_time_interval,
        }
        return f"{type(self).__qualname__}{options!r}"

    def checkpointing(self) -> Checkpointing:
        """When the run makes checkpoints of its own: whenever a file may be due."""
        interval = self._train_time_interval
        return Checkpointing(
            every_n_steps=self._every_n_train_steps or None,
            every_n_epochs=self._every_n_epochs or None,
            every_s=interval.total_seconds() if interval else None,
            monitor=self.monitor,
            mode=self.mode,
        )

    # ---- when

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if stage != "fit":
            return
        if self.dirpath is None or self.dirpath == self._found_dirpath:
            self.dirpath = self._found_dirpath = join_path(trainer.log_dir or "", CHECKPOINTS)
        self._begin()
        is_given = self._found_dirpath != self.dirpath and self.save_top_k != 0
        if is_given and trainer.is_global_zero and Storage(self.dirpath).list():
            trainer.notice(f"ModelCheckpoint: {self.dirpath} is not empty", "warning")

    def on_train_start(self, trainer: TrainerNames, module: Module) -> None:
        self._last_time_checked = time.monotonic()
        if self._other_dirpath is not None and self._other_dirpath != self.dirpath:
            text = f"only best_model_path is taken over from the checkpoint: its files lie in {self._other_dirpath}"
            self._tell(trainer, f"ModelCheckpoint: {text}", "warning")
            self._other_dirpath = None
        # A rank that takes the place of a lost one has not seen these.
        self._last_global_step_saved, self._last_checkpoint_saved, self._waits_for_validation = trainer.broadcast(
            (self._last_global_step_saved, self._last_checkpoint_saved, self._waits_for_validation)
        )

    def on_train_batch_end(
        self, trainer: TrainerNames, module: Module, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        every = self._every_n_train_steps
        is_due = every > 0 and trainer.global_step % every == 0
        if not is_due and not self._is_time_due(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        is_missing = self.monitor is not None and self.monitor not in candidates
        if is_missing or (module.automatic_optimization and self._is_stale(trainer)):
            self._waits_for_validation = True
        elif not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _is_time_due(self, trainer: TrainerNames) -> bool:
        interval, now = self._train_time_interval, time.monotonic()
        if interval is None:
            return False
        before = self._last_time_checked
        is_due = bool(trainer.broadcast(before is not None and now - before >= interval.total_seconds()))
        if is_due:
            self._last_time_checked = now
        return is_due

    def _is_stale(self, trainer: TrainerNames) -> bool:
        """Whether a validation follows this batch, whose value is the one to wait for."""
        if self.monitor is None or not trainer.is_last_batch or self._should_save_on_train_epoch_end(trainer):
            return False
        every = trainer.check_val_every_n_epoch
        is_validated = every is None or (trainer.current_epoch + 1) % every == 0
        return trainer.enable_validation and sum(trainer.num_val_batches) > 0 and is_validated

    def on_train_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        if not self._should_skip_saving_checkpoint(trainer) and self._should_save_on_train_epoch_end(trainer):
            self._save_after_epoch(trainer, self._monitor_candidates(trainer))

    def on_validation_end(self, trainer: TrainerNames, module: Module) -> None:
        self._has_validated |= not trainer.sanity_checking
        if self._should_skip_saving_checkpoint(trainer) or self._should_save_on_train_epoch_end(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self._waits_for_validation:
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
            self._waits_for_validation = False
        else:
            self._save_after_epoch(trainer, candidates)

    def _save_after_epoch(self, trainer: TrainerNames, candidates: Candidates) -> None:
        if self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._save_topk_checkpoint(trainer, candidates)
        is_saved = self._last_global_step_saved == trainer.global_step
        if is_saved or (self.save_last == "link" and self._last_checkpoint_saved):
            self._save_last_checkpoint(trainer, candidates)

    def on_exception(self, trainer: TrainerNames, module: Module, exception: BaseException) -> None:
        if not self.save_on_exception or trainer.fast_dev_run or trainer.sanity_checking or not trainer.fitting:
            return
        if self._last_global_step_saved == trainer.global_step:
            return
        candidates = self._own_candidates(trainer)
        path = self.format_checkpoint_name(candidates)
        self._is_alone = True
        self._save_checkpoint(trainer, path)
        self._save_last_checkpoint(trainer, candidates)
        self._is_alone = False
        self._tell(trainer, f"{type(exception).__name__} was raised; the last finished step goes to {path}")

    def on_train_end(self, trainer: TrainerNames, module: Module) -> None:
        if self.save_last and not self._last_checkpoint_saved and not trainer.fast_dev_run:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _should_skip_saving_checkpoint(self, trainer: TrainerNames) -> bool:
        is_saved = self._last_global_step_saved == trainer.global_step
        return bool(trainer.fast_dev_run) or not trainer.fitting or trainer.sanity_checking or is_saved

    def _should_save_on_train_epoch_end(self, trainer: TrainerNames) -> bool:
        if self._save_on_train_epoch_end is not None:
            return self._save_on_train_epoch_end
        if isinstance(trainer.val_check_interval, timedelta) or trainer.check_val_every_n_epoch != 1:
            return False
        return sum(trainer.num_val_batches) == 0 or trainer.val_check_interval == 1.0

    # ---- state

    def state_dict(self) -> dict[str, Value]:
        return {
            "monitor": self.monitor,
            "best_model_score": self.best_model_score,
            "best_model_path": self.best_model_path,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": dict(self.best_k_models),
            "kth_best_model_path": self.kth_best_model_path,
            "kth_value": self.kth_value,
            "last_model_path": self.last_model_path,
        }

    def load_state_dict(self, state_dict: dict[str, Value]) -> None:
        """From another `dirpath` only `best_model_path` is taken over."""
        self.best_model_path = state_dict["best_model_path"]
        self._other_dirpath = state_dict.get("dirpath", self.dirpath)
        if self._other_dirpath != self.dirpath:
            return
        self.best_model_score = state_dict["best_model_score"]
        for name in ("kth_best_model_path", "kth_value", "best_k_models", "last_model_path"):
            if name in state_dict:
                setattr(self, name, state_dict[name])

    # ---- what

    def _own_candidates(self, trainer: TrainerNames) -> Candidates:
        found = {name: torch.as_tensor(value).detach().cpu() for name, value in trainer.callback_metrics.items()}
        for name, value in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            found[name] = found[name].int() if name in found else torch.tensor(value)
        return found

    def _monitor_candidates(self, trainer: TrainerNames) -> Candidates:
        found: Candidates = trainer.broadcast(self._own_candidates(trainer))
        return found

    def _save_topk_checkpoint(self, trainer: TrainerNames, monitor_candidates: Candidates) -> None:
        if self.save_top_k == 0:
            return
        if self.monitor is None:
            self._save_none_monitor_checkpoint(trainer, monitor_candidates)
            return
        if self.monitor not in monitor_candidates:
            text = say_unknown_metric(self.monitor, monitor_candidates.keys() - {"epoch", "step"}, type(self).__name__)
            if self._has_validated:
                raise InvalidArguments(text)
            if not self._has_said_unknown:
                self._has_said_unknown = True
                self._tell(trainer, text, "warning")
        self._save_monitor_checkpoint(trainer, monitor_candidates)

    def _save_monitor_checkpoint(self, trainer: TrainerNames, monitor_candidates: Candidates) -> None:
        assert self.monitor is not None
        current = monitor_candidates.get(self.monitor)
        if current is not None and self.check_monitor_top_k(trainer, current):
            self._update_best_and_save(current, trainer, monitor_candidates)
        elif self.verbose:
            self._tell(
                trainer, f"{_say_place(monitor_candidates)}: {self.monitor} is not among the {self.save_top_k} best"
            )

    def check_monitor_top_k(self, trainer: TrainerNames, current: Tensor | None = None) -> bool:
        """Whether a state with this score is one of the best."""
        if current is None:
            return False
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        kth = self.best_k_models[self.kth_best_model_path]
        return bool(current < kth) if self.mode == "min" else bool(current > kth)

    def _save_none_monitor_checkpoint(self, trainer: TrainerNames, monitor_candidates: Candidates) -> None:
        path = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer, self.best_model_path)
        previous, self.best_model_path = self.best_model_path, path  # before: the file holds this state, too
        self._save_checkpoint(trainer, path)
        if self.save_top_k == 1 and previous and self._should_remove_checkpoint(trainer, previous, path):
            self._remove_checkpoint(trainer, previous)

    def _update_best_and_save(self, current: Tensor, trainer: TrainerNames, monitor_candidates: Candidates) -> None:
        most = len(self.best_k_models) + 1 if self.save_top_k == -1 else self.save_top_k
        dropped = None
        if len(self.best_k_models) == most > 0:
            dropped = self.kth_best_model_path
            del self.best_k_models[dropped]
        if torch.isnan(current):  # the worst there is
            current = torch.tensor(float("inf") if self.mode == "min" else float("-inf"))
        path = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer, dropped)
        self.current_score = self.best_k_models[path] = current
        best, worst = (min, max) if self.mode == "min" else (max, min)
        if len(self.best_k_models) == most:
            self.kth_best_model_path = worst(self.best_k_models, key=lambda one: float(self.best_k_models[one]))
            self.kth_value = self.best_k_models[self.kth_best_model_path]
        self.best_model_path = best(self.best_k_models, key=lambda one: float(self.best_k_models[one]))
        self.best_model_score = self.best_k_models[self.best_model_path]
        if self.verbose:
            reached = f"{self.monitor} is {current:0.5f}, the best {self.best_model_score:0.5f}"
            self._tell(trainer, f"{_say_place(monitor_candidates)}: {reached}; the model goes to {path}")
        self._save_checkpoint(trainer, path)
        if dropped and self._should_remove_checkpoint(trainer, dropped, path):
            self._remove_checkpoint(trainer, dropped)

    def _save_last_checkpoint(self, trainer: TrainerNames, monitor_candidates: Candidates) -> None:
        if not self.save_last:
            return
        template = self.CHECKPOINT_NAME_LAST
        path = self._find_path(trainer, monitor_candidates, template, self.last_model_path)
        previous, self.last_model_path = self.last_model_path, path  # before: the file holds this state, too
        if self.save_last == "link" and self._last_checkpoint_saved and self.save_top_k != 0:
            self._link_checkpoint(trainer, self._last_checkpoint_saved, path)
        else:
            self._save_checkpoint(trainer, path)
        if previous and self._should_remove_checkpoint(trainer, previous, path):
            self._remove_checkpoint(trainer, previous)

    def _tell(self, trainer: TrainerNames, text: str, level: str = "info") -> None:
        if trainer.is_global_zero or self._is_alone:
            trainer.notice(text, level)

    # ---- of a run without a ModelCheckpoint

    def take_kept(self, best: Checkpoint | None, last: Checkpoint | None) -> None:
        """Takes note of raylight's own checkpoints."""
        self.best_model_path = best.path if best is not None else ""
        self.last_model_path = last.path if last is not None else ""
        score = best.metrics.get(self.monitor or DEFAULT_MONITOR) if best is not None else None
        self.best_model_score = torch.tensor(score) if score is not None else None


def _say_place(candidates: Candidates) -> str:
    return f"epoch {int(candidates['epoch'])}, step {int(candidates['step'])}"
