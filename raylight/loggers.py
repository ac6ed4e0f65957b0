"""Loggers, by Lightning's names. They run in the driver, on values that are merged over all ranks."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from raylight.arguments.trainer_arguments import TakesMetrics
from raylight.contract.config import FilePath
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.report.csv_file import CsvFile
from raylight.report.tensorboard import TensorBoard
from raylight.storage.local_directory import LocalDirectory
from raylight.storage.row_writer import RowWriter

if TYPE_CHECKING:
    from raylight.storage.filesystem import Storage

DEFAULT_NAME = "lightning_logs"
CSV_INTERVAL_S = 1.0
SUMMARY_WRITER_OPTIONS = ("comment", "purge_step", "max_queue", "flush_secs", "filename_suffix")


class Logger(TakesMetrics):
    """A receiver of values and hyperparameters.

    To be one, an object needs `log_metrics(metrics, step)` and no base class; of the other methods, those that it has
    are called: `log_hyperparams(params)`, `save()` and `finalize(status)`, "success" or "failed".
    """

    @property
    def name(self) -> str | None:
        return None

    @property
    def version(self) -> int | str | None:
        return None

    @property
    def save_dir(self) -> str | None:
        return None

    @property
    def log_dir(self) -> str | None:
        return None

    @property
    def experiment(self) -> Value:
        """The object that this logger writes with."""
        return self

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None) -> None:
        """`step` counts optimizer steps. `metrics` has the epoch too, under "epoch"."""

    def log_hyperparams(self, params: Value, *args: Value, **kwargs: Value) -> None: ...
    def log_graph(self, model: Value, input_array: Value = None) -> None: ...
    def save(self) -> None: ...
    def finalize(self, status: str) -> None: ...
    def after_save_checkpoint(self, checkpoint_callback: Value) -> None: ...


class FileLogger(Logger):
    """A logger that writes files: to `<save_dir>/<name>/version_N` (a path or URI), or, if `save_dir` is left out,
    beside the other files of the run's version. `prefix` goes before the name of every metric."""

    def __init__(self, save_dir: FilePath | None, name: str | None, version: int | str | None, prefix: str):
        if save_dir is None and (name != DEFAULT_NAME or version is not None):
            raise InvalidArguments(
                f"{type(self).__name__}: name and version need save_dir. Without it values go to the version of the "
                "run, which Trainer(storage_path=..., name=...) names."
            )
        self._save_dir = None if save_dir is None else str(save_dir)
        self._name, self._version = name or "", version
        self._prefix = f"{prefix}-" if prefix else ""
        self._files: Storage | None = None
        self._last_step = -1

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str | None:
        """None until the run begins, unless it was given."""
        return self._version

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def log_dir(self) -> str | None:
        """Where the files go, as a path or URI; None until the run begins."""
        return self._files.uri if self._files is not None else None

    def attach(self, files: Storage) -> None:
        """Prepares for a run whose version has these files. Raises StorageError if `save_dir` cannot be written to."""
        self._files = files if self._save_dir is None else self._claim(self._save_dir)

    def _claim(self, save_dir: str) -> Storage:
        from raylight.storage.filesystem import Storage
        from raylight.storage.versions import claim_version

        root, name = Storage(save_dir), self._name
        if not name:
            root, name = root.parent(), root.name
        if self._version is None:
            self._version = claim_version(root, name).number
        return root.child(name, self._version if isinstance(self._version, str) else f"version_{self._version}")

    def _prepare(self, metrics: Mapping[str, Value], step: int | None) -> tuple[dict[str, float], int]:
        """Plain numbers under prefixed names; without a step, the one after the last."""
        self._last_step = self._last_step + 1 if step is None else int(step)
        values = {}
        for name, value in metrics.items():
            try:
                values[self._prefix + name] = float(value)
            except (TypeError, ValueError) as error:
                raise InvalidArguments(
                    f"{type(self).__name__}.log_metrics: {name!r} is no number but {type(value).__name__}: {error}"
                ) from error
        return values, self._last_step

    def __getstate__(self) -> dict[str, Value]:
        """A copy, as in another process, is not attached: the driver alone writes."""
        return {name: None if name in self._live else value for name, value in vars(self).items()}

    _live: tuple[str, ...] = ("_files",)


class TensorBoardLogger(FileLogger):
    """TensorBoard's event files: scalars, and hyperparameters for the HParams tab.

    `sub_dir`, `log_graph` and the options of torch's SummaryWriter are Lightning's; of those,
    `log_graph=True` cannot be had, since the driver runs no batch. `default_hp_metric` has no effect: the HParams tab
    shows the newest value of every metric.
    """

    _live = ("_files", "_writer", "_experiment")

    def __init__(
        self,
        save_dir: FilePath | None = None,
        name: str | None = DEFAULT_NAME,
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | None = None,
        **options: Value,
    ):
        mistakes = [_unknown_option(option) for option in options if option not in SUMMARY_WRITER_OPTIONS]
        if log_graph:
            mistakes.append("TensorBoardLogger: log_graph=True is not there; call logger.experiment.add_graph yourself")
        if mistakes:
            raise InvalidArguments(mistakes)
        super().__init__(save_dir, name, version, prefix)
        self._sub_dir = sub_dir
        self._options = options
        self._writer: TensorBoard | None = None
        self._experiment: Value = None

    @property
    def experiment(self) -> Value:
        """torch's SummaryWriter on the same directory, for images, histograms and text."""
        if self._experiment is None:
            from torch.utils.tensorboard import SummaryWriter

            self._experiment = SummaryWriter(self._attached().path, **self._options)
        return self._experiment

    def attach(self, files: Storage) -> None:
        super().attach(files)
        assert self._files is not None
        if self._sub_dir:
            self._files = self._files.child(self._sub_dir)
        self._writer = TensorBoard(self._files)

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None, seconds: float | None = None) -> None:
        """`seconds` since 1970 is when the values were measured; now, if it is not given."""
        values, step = self._prepare(metrics, step)
        self._attached().log_metrics(values, step, seconds)

    def log_hyperparams(
        self, params: Value, metrics: Mapping[str, Value] | None = None, step: int | None = None, **_: object
    ) -> None:
        self._attached().log_hyperparameters(_to_mapping(params))
        if metrics:
            self.log_metrics(metrics, step or 0)

    def drop_after(self, step: int) -> None:
        """An attempt begins that redoes the steps beyond `step`: what was logged for them is not shown."""
        self._attached().drop_after(step)

    def save(self) -> None:
        self._attached().flush()

    def finalize(self, status: str) -> None:
        experiment, self._experiment = self._experiment, None
        if experiment is not None:
            experiment.close()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close(succeeded=status == "success")

    def _attached(self) -> TensorBoard:
        if self._writer is None:
            raise RuntimeError("TensorBoardLogger writes while a run goes on: pass it as Trainer(logger=...)")
        return self._writer


class CSVLogger(FileLogger):
    """`metrics.csv`, and `hparams.yaml` (as JSON, which is YAML). Written every second, so
    `flush_logs_every_n_steps` has no effect."""

    _live = ("_files", "_writer", "_directory", "_file")

    def __init__(
        self,
        save_dir: FilePath | None = None,
        name: str | None = DEFAULT_NAME,
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ):
        super().__init__(save_dir, name, version, prefix)
        self._writer: RowWriter[dict[str, float] | int] | None = None
        self._directory: LocalDirectory | None = None
        self._file: CsvFile | None = None

    def attach(self, files: Storage) -> None:
        super().attach(files)
        assert self._files is not None
        self._directory = LocalDirectory(self._files)
        self._file = None
        self._writer = RowWriter("metrics.csv", self._append, self._directory.copy, CSV_INTERVAL_S)

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None) -> None:
        values, step = self._prepare(metrics, step)
        self._attached().add({**values, "step": step})

    def log_hyperparams(self, params: Value, *args: Value, **kwargs: Value) -> None:
        assert self._files is not None
        text = json.dumps(dict(_to_mapping(params)), indent=2, default=str)
        self._files.write("hparams.yaml", [text.encode()])

    def drop_after(self, step: int) -> None:
        """An attempt begins that redoes the steps beyond `step`: their rows are taken out."""
        self._attached().add(step)

    def save(self) -> None:
        self._attached().flush()

    def finalize(self, status: str) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and self._directory is not None:
            try:
                writer.close()
            finally:  # if storage is away, the directory says in which local file the rows are
                self._directory.close()

    def _attached(self) -> RowWriter[dict[str, float] | int]:
        if self._writer is None:
            raise RuntimeError("CSVLogger writes while a run goes on: pass it as Trainer(logger=...)")
        return self._writer

    def _append(self, rows: list[dict[str, float] | int]) -> None:
        assert self._directory is not None
        if self._file is None:
            self._file = CsvFile(self._directory.fetch("metrics.csv"))
        self._file.append(rows)


def make_loggers(setting: Value, files: Storage, version_path: str) -> list[Value]:
    """The loggers of a run whose version lies at `version_path`, from the trainer's argument `logger`.

    True means TensorBoard, False none; a logger or a list of them is taken as it is.
    """
    if setting is True:
        setting = TensorBoardLogger()
    given = list(setting) if isinstance(setting, (list, tuple)) else [setting] if setting else []
    for logger in given:
        if isinstance(logger, FileLogger):
            logger.attach(files)
    return given


def _to_mapping(params: Value) -> Mapping[str, Value]:
    return params if isinstance(params, Mapping) else vars(params)


def _unknown_option(name: str) -> str:
    near = difflib.get_close_matches(name, (*SUMMARY_WRITER_OPTIONS, "save_dir", "name", "version", "prefix"), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(SUMMARY_WRITER_OPTIONS)} of SummaryWriter"
    return f"TensorBoardLogger has no argument {name!r}{hint}"
