"""The files of ModelCheckpoint: what they are called, and how they are asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from raylight.callbacks.checkpoint import Checkpoint
from raylight.callbacks.checkpoint_names import fill_in, find_free, join_path
from raylight.contract.config import FilePath
from raylight.contract.messages import FileDropped, FileWanted, LinkWanted
from raylight.storage import single_file

if TYPE_CHECKING:
    from raylight.user.trainer_names import TrainerNames

Candidates = dict[str, Tensor]
"""The newest value of everything logged, with epoch and step."""


class CheckpointFiles(Checkpoint):
    """Names files after metrics, and asks the driver to write, link and delete them; on every rank alike."""

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    dirpath: str | None
    filename: str | None
    save_weights_only: bool
    auto_insert_metric_name: bool
    best_k_models: dict[str, Tensor]
    last_model_path: str
    _enable_version_counter: bool
    _last_global_step_saved: int
    _last_checkpoint_saved: str
    _is_alone = False
    """An exception was raised on this rank, and the others do not come here."""

    # ---- names

    def format_checkpoint_name(
        self, metrics: Candidates, filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """The path of a file: `filename`, by default that of this callback, filled in with `metrics`."""
        name = self._format_checkpoint_name(
            filename or self.filename, metrics, prefix, auto_insert_metric_name=self.auto_insert_metric_name
        )
        if ver is not None:
            name = f"{name}{self.CHECKPOINT_JOIN_CHAR}v{ver}"
        return join_path(str(self.dirpath or ""), name + self.FILE_EXTENSION)

    def _format_checkpoint_name(
        self, filename: str | None, metrics: Candidates, prefix: str | None = None, auto_insert_metric_name: bool = True
    ) -> str:
        template = filename or f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"
        name = fill_in(template, metrics, with_names=auto_insert_metric_name, equals=self.CHECKPOINT_EQUALS_CHAR)
        return name if prefix is None else f"{prefix}{self.CHECKPOINT_JOIN_CHAR}{name}"

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: Candidates, trainer: TrainerNames, del_filepath: str | None = None
    ) -> str:
        return self._find_path(trainer, monitor_candidates, None, del_filepath)

    def _find_path(self, trainer: TrainerNames, metrics: Candidates, template: str | None, replaced: str | None) -> str:
        """A path where no file is, other than the one that is `replaced`."""

        def name_of(version: int | None) -> str:
            if version is None:
                return self.format_checkpoint_name(metrics, template)
            return self.format_checkpoint_name(metrics, template, ver=version)

        if not self._enable_version_counter:
            return name_of(None)
        return find_free(
            name_of, lambda path: self.file_exists(path, trainer) and path != replaced, self.STARTING_VERSION
        )

    def file_exists(self, filepath: FilePath, trainer: TrainerNames) -> bool:
        """Whether rank 0 finds a file there, or one is on its way."""
        is_there = False
        if trainer.is_global_zero or self._is_alone:
            wanted = trainer.is_file_wanted(filepath)
            is_there = single_file.is_file(filepath) if wanted is None else wanted
        return is_there if self._is_alone else bool(trainer.broadcast(is_there))

    # ---- what becomes of them

    @property
    def _writes_at_once(self) -> bool:
        """Whether a subclass does something with the file as soon as it was saved."""
        return type(self)._save_checkpoint is not CheckpointFiles._save_checkpoint and not self._is_alone

    def _save_checkpoint(self, trainer: TrainerNames, filepath: str) -> None:
        """Saves the present state."""
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if self._writes_at_once:
            trainer.save_checkpoint(filepath, self.save_weights_only)
            return
        state = (self.state_key, self.state_dict())
        trainer.order_file(FileWanted(filepath, self.save_weights_only, trainer.current_epoch, state))

    def _link_checkpoint(self, trainer: TrainerNames, filepath: str, linkpath: str) -> None:
        if os.path.abspath(filepath) != os.path.abspath(linkpath):
            trainer.order_file(LinkWanted(linkpath, filepath))

    def _remove_checkpoint(self, trainer: TrainerNames, filepath: str) -> None:
        trainer.order_file(FileDropped(filepath))

    def _should_remove_checkpoint(self, trainer: TrainerNames, previous: str, current: str) -> bool:
        """A local file stays where it is not in this callback's directory, or is what the run was resumed from."""
        if previous == current:
            return False
        if "://" in previous:
            return True
        path, source = Path(previous).absolute(), trainer.ckpt_path
        if source is not None and path == Path(source).absolute():
            return False
        return Path(self.dirpath or "").absolute() in path.parents

    def to_yaml(self, filepath: FilePath | None = None) -> None:
        """Writes `best_k_models`, path and score, by default to `best_k_models.yaml` in `dirpath`."""
        path = filepath if filepath is not None else join_path(str(self.dirpath or ""), "best_k_models.yaml")
        lines = [
            f"{json.dumps(name)}: {_to_yaml(float(score))}\n" for name, score in sorted(self.best_k_models.items())
        ]
        with single_file.open_write(path) as file:
            file.write("".join(lines or ["{}\n"]).encode())


def _to_yaml(number: float) -> str:
    return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(str(number), repr(number))


def absolute(directory: FilePath) -> str:
    """A local directory as seen from anywhere; a URI as it is."""
    path = os.fspath(directory)
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))
