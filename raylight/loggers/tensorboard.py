"""TensorBoardLogger: values, hyperparameters, images, texts and graphs as TensorBoard reads them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from raylight.contract.config import FilePath
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.contract.seeding import isolate_rng
from raylight.loggers.file_logger import DEFAULT_NAME, FileLogger
from raylight.loggers.parameters import to_mapping
from raylight.report.tensorboard import TensorBoard

if TYPE_CHECKING:
    from raylight.storage.filesystem import Storage

SUMMARY_WRITER_OPTIONS = ("comment", "purge_step", "max_queue", "flush_secs", "filename_suffix")
FLUSH_EVERY_S = 5


class EventWriter:
    """The event files of one version: raylight's own with scalars and hyperparameters, and torch's beside it once
    something else is logged."""

    def __init__(self, files: Storage, options: Mapping[str, Value]):
        self.scalars = TensorBoard(files)
        self._options = {"flush_secs": FLUSH_EVERY_S, **options}
        self._summaries: Value = None

    @property
    def summaries(self) -> Value:
        """torch's SummaryWriter on the same directory."""
        if self._summaries is None:
            from torch.utils.tensorboard import SummaryWriter

            self._summaries = SummaryWriter(self.scalars.path, **self._options)
            self.scalars.keep_copying()
        return self._summaries

    def drop_after(self, step: int) -> None:
        self.scalars.drop_after(step)

    def flush(self) -> None:
        if self._summaries is not None:
            self._summaries.flush()
        self.scalars.flush()

    def close(self, succeeded: bool) -> None:
        if self._summaries is not None:
            self._summaries.close()
        self.scalars.close(succeeded=succeeded)


class TensorBoardLogger(FileLogger[EventWriter]):
    """TensorBoard's event files and `hparams.yaml`.

    `sub_dir`, `log_graph` and the options of torch's SummaryWriter are Lightning's. `log_graph=True` traces the module
    with its `example_input_array`, in the driver, before training. `default_hp_metric` has no effect: the HParams tab
    shows the newest value of every metric.
    """

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
        if mistakes:
            raise InvalidArguments(mistakes)
        super().__init__(save_dir, name, version, prefix)
        self.sub_dir = sub_dir
        self._log_graph, self._options = log_graph, options

    @property
    def experiment(self) -> Value:
        """torch's SummaryWriter on the same directory, for images, figures, histograms and text."""
        return self._open().summaries

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None, seconds: float | None = None) -> None:
        """`seconds` since 1970 is when the values were measured; now, if it is not given."""
        values, step = self._prepare(metrics, step)
        self._open().scalars.log_metrics(values, step, seconds)
        self._settle()

    def log_hyperparams(
        self, params: Value, metrics: Mapping[str, Value] | None = None, step: int | None = None, **_: object
    ) -> None:
        """Shows them in the HParams tab, and `metrics` as scalars."""
        self._open().scalars.log_hyperparameters(to_mapping(params))
        super().log_hyperparams(params)
        if metrics:
            self.log_metrics(metrics, step or 0)
        self._settle()

    def log_graph(self, model: Value, input_array: Value = None) -> None:
        """Traces `model`, if the logger was made with `log_graph=True`."""
        if not self._log_graph:
            return
        example = model.example_input_array if input_array is None else input_array
        if example is None:
            raise ValueError("log_graph=True needs model.example_input_array, which is None")
        with isolate_rng():
            self.experiment.add_graph(model, example)

    def _find(self) -> Storage | None:
        files = super()._find()
        return files.child(self.sub_dir) if files is not None and self.sub_dir else files

    def _make_writer(self, files: Storage) -> EventWriter:
        return EventWriter(files, self._options)


def _unknown_option(name: str) -> str:
    near = difflib.get_close_matches(name, (*SUMMARY_WRITER_OPTIONS, "save_dir", "name", "version", "prefix"), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(SUMMARY_WRITER_OPTIONS)} of SummaryWriter"
    return f"TensorBoardLogger has no argument {name!r}{hint}"
