"""SaveConfigCallback: the configuration of a run, beside its other files."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from raylight.cli.argument_parser import LightningArgumentParser
from raylight.contract.errors import InvalidArguments
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


class SaveConfigCallback(Callback):
    """Writes the configuration of a LightningCLI into the version's directory when a run starts, on rank 0.

    `parser` is the one that read `config`; `config_filename` names the file, `overwrite` lets it replace another one
    that differs, and `multifile` keeps what came from several files in several. A subclass that implements
    `save_config` may turn off the file with `save_to_log_dir=False`. A run that goes on in its own version replaces the
    file. `predict` has no version, and so the file is not written.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        if not save_to_log_dir and type(self).save_config is SaveConfigCallback.save_config:
            raise InvalidArguments(
                f"{type(self).__name__}: with save_to_log_dir=False nothing would be saved; implement save_config in a "
                "subclass"
            )
        self.parser, self.config = parser, config
        self.config_filename, self.overwrite, self.multifile = config_filename, overwrite, multifile
        self.save_to_log_dir = save_to_log_dir
        self.already_saved = False

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        if self.save_to_log_dir:
            self._write(trainer)
        self.save_config(trainer, module, stage)
        self.already_saved = True

    def save_config(self, trainer: TrainerNames, pl_module: Module, stage: str) -> None:
        """Override it to save the configuration in another place, too; `self.parser.dump(self.config,
        skip_unset=False)` is its text. Called on rank 0 alone, so nothing in it may wait for other ranks."""

    def _write(self, trainer: TrainerNames) -> None:
        files = trainer.files
        if files is None:
            return
        # No rank waits here for another: a replacement of rank 0 comes alone.
        with TemporaryDirectory() as folder:
            self.parser.save(
                self.config, f"{folder}/{self.config_filename}", skip_unset=False, multifile=self.multifile
            )
            made = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        for path, data in made.items():
            is_free = self.overwrite or trainer.attempt > 0 or not files.exists(str(path))
            if is_free:
                files.write(str(path), [data])
            elif files.open_read(str(path)).read() != data:
                raise InvalidArguments(
                    f"{type(self).__name__}: {trainer.log_dir}/{path} is there already and differs. "
                    'LightningCLI(save_config_kwargs={"overwrite": True}) replaces it, save_config_callback=None saves '
                    "none."
                )
