"""CSVLogger: values as rows of a CSV file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from raylight.contract.config import FilePath
from raylight.contract.kinds import Value
from raylight.loggers.file_logger import DEFAULT_NAME, FileLogger
from raylight.report.csv_file import CsvFile
from raylight.storage.local_directory import LocalDirectory
from raylight.storage.row_writer import RowWriter

if TYPE_CHECKING:
    from raylight.storage.filesystem import Storage

CSV_INTERVAL_S = 1.0
METRICS_FILE = "metrics.csv"


class ExperimentWriter:
    """Appends rows to `metrics.csv`, from a thread."""

    def __init__(self, files: Storage):
        self.log_dir = files.uri
        self._directory = LocalDirectory(files)
        self._file: CsvFile | None = None
        self._rows = RowWriter[dict[str, float] | int](METRICS_FILE, self._append, self._directory.copy, CSV_INTERVAL_S)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._rows.add({**metrics, "step": step})

    def drop_after(self, step: int) -> None:
        self._rows.add(step)

    def flush(self) -> None:
        self._rows.flush()

    save = flush

    def close(self, succeeded: bool = True) -> None:
        try:
            self._rows.close()
        finally:  # if storage is away, the directory says in which local file the rows are
            self._directory.close()

    def _append(self, rows: list[dict[str, float] | int]) -> None:
        if self._file is None:
            self._file = CsvFile(self._directory.fetch(METRICS_FILE))
        self._file.append(rows)


class CSVLogger(FileLogger[ExperimentWriter]):
    """`metrics.csv` and `hparams.yaml`. Written every second, so `flush_logs_every_n_steps` has no effect."""

    def __init__(
        self,
        save_dir: FilePath | None = None,
        name: str | None = DEFAULT_NAME,
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ):
        super().__init__(save_dir, name, version, prefix)

    @property
    def experiment(self) -> ExperimentWriter:
        """The open file."""
        return self._open()

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None) -> None:
        self._open().log_metrics(*self._prepare(metrics, step))
        self._settle()

    def _make_writer(self, files: Storage) -> ExperimentWriter:
        return ExperimentWriter(files)
