"""FileLogger: what loggers that write files share."""

from __future__ import annotations

import atexit
import os
import weakref
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from raylight.contract.config import FilePath
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.loggers.parameters import HPARAMS_FILE, to_mapping, to_numbers, to_yaml
from raylight.user.logger import Logger

if TYPE_CHECKING:
    from raylight.storage.filesystem import Storage

DEFAULT_NAME = "lightning_logs"


class Writer(Protocol):
    """The open files of a logger."""

    def drop_after(self, step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self, succeeded: bool) -> None: ...


W = TypeVar("W", bound=Writer)


class FileLogger(Logger, Generic[W]):
    """A logger that writes files: to `<save_dir>/<name>/version_N` (a path or URI), or, if `save_dir` is left out,
    beside the other files of the run's version. `prefix` goes before the name of every metric.

    With `save_dir` it works without a run too. What is logged outside a run is written at once.
    """

    _live: tuple[str, ...] = ("_files", "_writer")
    """Attributes that stay in this process."""

    def __init__(self, save_dir: FilePath | None, name: str | None, version: int | str | None, prefix: str):
        if save_dir is None and (name != DEFAULT_NAME or version is not None):
            raise InvalidArguments(
                f"{type(self).__name__}: name and version need save_dir. Without it values go to the version of the "
                "run, which Trainer(storage_path=..., name=...) names."
            )
        self._save_dir = None if save_dir is None else os.path.expanduser(os.path.expandvars(os.fspath(save_dir)))
        self._name, self._version, self._prefix = (name or "").strip("/"), version, prefix
        self.hparams: dict[str, Value] = {}
        """All hyperparameters so far."""
        self._files: Storage | None = None
        self._writer: W | None = None
        self._in_run = False
        self._last_step = -1

    # ---- where the files are

    @property
    def name(self) -> str:
        if self._save_dir is None and self._files is not None:
            return self._files.parent().name
        return self._name

    @property
    def version(self) -> int | str | None:
        """Claimed when it is first asked for; without `save_dir` that of the run, and None until it begins."""
        if self._version is None and self._save_dir is not None:
            self._claim(self._save_dir)
        return self._version

    @property
    def save_dir(self) -> str | None:
        if self._save_dir is None and self._files is not None:
            return self._files.parent().parent().uri
        return self._save_dir

    @property
    def root_dir(self) -> str | None:
        if self._save_dir is not None:
            return os.path.join(self._save_dir, self._name)
        return self._files.parent().uri if self._files is not None else None

    @property
    def log_dir(self) -> str | None:
        """Where the files go, as a path or URI; without `save_dir` None until the run begins."""
        files = self._find()
        return files.uri if files is not None else None

    def attach(self, files: Storage | None) -> None:
        """Prepares for a run whose version has these files. Raises StorageError if `save_dir` cannot be written to."""
        if self._save_dir is None and files is not None:
            from raylight.storage.versions import number_of

            self.close()
            self._files, self._version, self.hparams = files, number_of(files.name), {}
        self._open()
        self._in_run = True

    def _find(self) -> Storage | None:
        if self._files is None and self._save_dir is not None:
            self._files = self._claim(self._save_dir)
        return self._files

    def _claim(self, save_dir: str) -> Storage:
        from raylight.storage.filesystem import Storage
        from raylight.storage.versions import check_name, claim_version

        root, *above = Storage(save_dir), *self._name.split("/")[:-1]
        for folder in above:
            check_name(folder)
            root = root.child(folder)
        name = self._name.rpartition("/")[2]
        if not name:
            root, name = root.parent(), root.name
        if self._version is None:
            self._version = claim_version(root, name).number
        return root.child(name, self._version if isinstance(self._version, str) else f"version_{self._version}")

    # ---- writing

    def log_hyperparams(self, params: Value, *args: Value, **kwargs: Value) -> None:
        """Adds to `hparams.yaml`."""
        self.hparams |= to_mapping(params)
        self._write_hparams()

    def _write_hparams(self) -> None:
        files = self._find()
        if files is None:
            self._refuse()
        else:
            files.write(HPARAMS_FILE, [to_yaml(self.hparams)])

    def drop_after(self, step: int) -> None:
        """An attempt begins that redoes the steps beyond `step`: what was logged for them is taken back."""
        self._open().drop_after(step)

    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: str) -> None:
        """Ends the files of this run; what is logged later goes on in them."""
        self._in_run, was_open = False, self._writer is not None
        self.close(succeeded=status == "success")
        if was_open and not self.hparams:
            self._write_hparams()  # an empty file, as Lightning's

    def close(self, succeeded: bool = True) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close(succeeded)

    @abstractmethod
    def _make_writer(self, files: Storage) -> W: ...

    def _open(self) -> W:
        if self._writer is None:
            files = self._find()
            if files is None:
                self._refuse()
            assert files is not None
            self._writer = self._make_writer(files)
            atexit.register(_close, weakref.ref(self))
        return self._writer

    def _settle(self) -> None:
        """Outside a run nobody else would see to it."""
        if not self._in_run:
            self.save()

    def _refuse(self) -> None:
        raise RuntimeError(
            f"{type(self).__name__} has nowhere to write before a run: give it save_dir=..., "
            "or pass it as Trainer(logger=...) and use trainer.logger"
        )

    def _prepare(self, metrics: Mapping[str, Value], step: int | None) -> tuple[dict[str, float], int]:
        """Plain numbers under prefixed names; without a step, the one after the last."""
        self._last_step = self._last_step + 1 if step is None else int(step)
        return to_numbers(type(self).__name__, metrics, self._prefix), self._last_step

    def __getstate__(self) -> dict[str, Value]:
        """A copy, as in another process, has no open files and is in no run."""
        state = {name: None if name in self._live else value for name, value in vars(self).items()}
        return state | {"_in_run": False, "_version": self._version if self._save_dir is not None else None}


def _close(reference: weakref.ref[FileLogger[W]]) -> None:
    logger = reference()
    if logger is not None:
        logger.close()
