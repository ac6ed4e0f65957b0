"""Logged values and hyperparameters as TensorBoard shows them."""

from __future__ import annotations

import numbers
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from raylight.contract.plain_text import to_utf8
from raylight.contract.task import Files
from raylight.report.event_file import Event, EventFile, ScalarRow, encode_restart
from raylight.storage.local_directory import LocalDirectory
from raylight.storage.row_writer import RowWriter

WRITE_INTERVAL_S = 1.0
MAX_TEXT_LENGTH = 500

Values = Mapping[str, float]


class TensorBoard:
    """Writes one event file beside the files of a version. A call costs microseconds: a thread does the rest."""

    def __init__(self, files: Files):
        self._directory = LocalDirectory(files)
        self._event_file: EventFile | None = None
        self._writer: RowWriter[ScalarRow | Event] = RowWriter(
            "TensorBoard's events", self._append, self._directory.copy, WRITE_INTERVAL_S
        )
        self._hyperparameters: dict[str, float | str | bool] = {}

    @property
    def path(self) -> str:
        """The directory of the event files on this machine."""
        return self._directory.path

    def log_metrics(self, values: Values, step: int, seconds: float | None = None) -> None:
        """`seconds` since 1970; by default now."""
        self._writer.add((dict(values), step, time.time() if seconds is None else seconds))

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Set what the HParams tab shows for this version, beside the newest value of each metric.

        TensorBoard takes the first such event of a version alone; calls within a second go into one.
        """
        is_first = not self._hyperparameters
        self._hyperparameters |= flatten(values)
        if is_first and self._hyperparameters:
            self._writer.add(partial(_encode_session_start, self._hyperparameters, time.time()))

    def drop_after(self, step: int) -> None:
        """Hide values logged so far beyond `step` in TensorBoard: an attempt begins that makes those steps again."""
        self._writer.add(partial(encode_restart, step + 1, time.time()))

    def keep_copying(self) -> None:
        """Brings what others write to `path` to storage, too."""
        self._writer.start()

    def flush(self) -> None:
        self._writer.flush()

    def close(self, succeeded: bool = True) -> None:
        if self._hyperparameters:
            self._writer.add(partial(_encode_session_end, succeeded, time.time()))
        try:
            self._writer.close()
        finally:  # the error names the directory if storage is away
            if self._event_file is not None:
                self._event_file.close()
            self._directory.close()

    def _append(self, rows: list[ScalarRow | Event]) -> None:
        if self._event_file is None:
            self._event_file = EventFile(self._directory.path)
        self._event_file.append(rows)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | str | bool]:
    """Hyperparameters as the HParams tab takes them: numbers, texts and booleans; nested names joined by "/"."""
    flat: dict[str, float | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{to_utf8(str(name))}/")
        elif isinstance(value, bool):
            flat[prefix + to_utf8(str(name))] = value
        elif isinstance(value, numbers.Real):
            flat[prefix + to_utf8(str(name))] = float(value)
        else:
            text = value if isinstance(value, str) else str(value)[:MAX_TEXT_LENGTH]
            flat[prefix + to_utf8(str(name))] = to_utf8(text)
    return flat


def _encode_session_start(values: Mapping[str, float | str | bool], seconds: float) -> bytes:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    session = SessionStartInfo(start_time_secs=seconds)
    for name, value in list(values.items()):  # the driver may add more meanwhile
        if isinstance(value, bool):
            session.hparams[name].bool_value = value
        elif isinstance(value, str):
            session.hparams[name].string_value = value
        else:
            session.hparams[name].number_value = value
    return _encode_session("start", HParamsPluginData(session_start_info=session), seconds)


def _encode_session_end(succeeded: bool, seconds: float) -> bytes:
    from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    session = SessionEndInfo(status=STATUS_SUCCESS if succeeded else STATUS_FAILURE, end_time_secs=seconds)
    return _encode_session("end", HParamsPluginData(session_end_info=session), seconds)


def _encode_session(edge: str, data: Any, seconds: float) -> bytes:
    """An `Event` of the HParams plugin; `edge` is "start" or "end". TensorBoard itself then finds out the columns
    from all versions that it shows, as it does if no experiment is described."""
    from tensorboard.compat.proto.event_pb2 import Event as EventMessage
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
    value = Summary.Value(tag=f"_hparams_/session_{edge}_info", metadata=SummaryMetadata(plugin_data=plugin))
    return EventMessage(wall_time=seconds, summary=Summary(value=[value])).SerializeToString()
