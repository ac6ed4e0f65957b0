"""What TensorBoard itself loads from a version: scalars, hyperparameters, and nothing of steps that were redone."""

from __future__ import annotations

import argparse
import os
import time
import uuid

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS, ListSessionGroupsRequest
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from raylight.report.tensorboard import TensorBoard, flatten
from raylight.storage.filesystem import Storage


@pytest.fixture
def files(tmp_path):
    return Storage(tmp_path / "version_0")


def load(path) -> EventAccumulator:
    return EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_scalars_are_read_back_with_their_steps_and_times(files):
    board = TensorBoard(files)
    for step in range(1, 201):
        board.log_metrics({"loss": 1 / step, "epoch": step // 100}, step, 1.7e9 + step)
    board.log_metrics({"val_loss": 0.25}, 200)
    board.close()
    events = load(files.uri)
    assert [(e.step, e.wall_time) for e in events.Scalars("loss")] == [(s, 1.7e9 + s) for s in range(1, 201)]
    assert events.Scalars("loss")[3].value == pytest.approx(0.25)
    assert [e.value for e in events.Scalars("epoch")][98:100] == [0.0, 1.0]
    (val_loss,) = events.Scalars("val_loss")
    assert abs(val_loss.wall_time - time.time()) < 60


def test_what_was_logged_is_visible_while_the_run_goes_on(files):
    board = TensorBoard(files)
    board.log_metrics({"loss": 1.0}, 1)
    board.flush()
    assert [e.step for e in load(files.uri).Scalars("loss")] == [1]
    board.log_metrics({"loss": 0.5}, 2)
    board.flush()
    assert [e.step for e in load(files.uri).Scalars("loss")] == [1, 2]
    board.close()


def test_steps_that_are_redone_are_shown_once(files):
    board = TensorBoard(files)
    for step in (1, 2, 3, 4):
        board.log_metrics({"loss": 10.0}, step)
    board.drop_after(2)
    board.log_metrics({"loss": 1.0}, 3)
    board.close()
    assert [(e.step, e.value) for e in load(files.uri).Scalars("loss")] == [(1, 10.0), (2, 10.0), (3, 1.0)]


def test_a_resumed_version_gets_a_second_file(files):
    for step in (1, 2):
        board = TensorBoard(files)
        board.log_metrics({"loss": float(step)}, step)
        board.close()
    assert [e.step for e in load(files.uri).Scalars("loss")] == [1, 2]


def test_nothing_logged_writes_nothing(files):
    TensorBoard(files).close()
    assert files.list() == []


def test_the_hparams_tab_compares_versions(tmp_path):
    for number, rate in enumerate([0.1, 0.01]):
        board = TensorBoard(Storage(tmp_path / f"version_{number}"))
        board.log_hyperparameters({"lr": rate, "optimizer": "adam", "net": {"depth": 2, "bias": True}, "seed": None})
        board.log_hyperparameters({"extra": number})
        board.log_metrics({"val_loss": 1.0 + number}, 10)
        board.log_metrics({"val_loss": 0.5 + number}, 20)
        board.close()
    groups = list_session_groups(tmp_path)
    assert [group["name"] for group in groups] == ["version_0", "version_1"]
    assert groups[1]["hparams"] == {
        "lr": 0.01, "optimizer": "adam", "net/depth": 2.0, "net/bias": True, "seed": "None", "extra": 1.0,
    }  # fmt: skip
    assert [group["metrics"]["val_loss"] for group in groups] == [0.5, 1.5]
    assert [group["status"] for group in groups] == [STATUS_SUCCESS] * 2


def list_session_groups(directory) -> list[dict]:
    """Asks the HParams plugin's own backend, as the page does."""
    multiplexer = EventMultiplexer(size_guidance={"scalars": 0, "tensors": 0}).AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(directory))
    context = Context(base_plugin.TBContext(data_provider=provider, flags=argparse.Namespace(generic_data="true")))
    request_context, experiment_id = RequestContext(), ""
    content = context.hparams_metadata(request_context, experiment_id)
    experiment = context.experiment_from_metadata(
        request_context, experiment_id, True, content,
        context.hparams_from_data_provider(request_context, experiment_id, limit=100),
    )  # fmt: skip
    assert {info.name.tag for info in experiment.metric_infos} == {"val_loss"}
    assert all(metadata.SESSION_START_INFO_TAG in tags for tags in content.values())
    request = ListSessionGroupsRequest(start_index=0, slice_size=10, include_metrics=True, allowed_statuses=[1, 2, 3])
    response = Handler(request_context, context, experiment_id, request).run()
    groups = [
        {
            "name": group.sessions[0].name,
            "status": group.sessions[0].status,
            "hparams": {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()},
            "metrics": {value.name.tag: value.value for value in group.metric_values},
        }
        for group in response.session_groups
    ]
    return sorted(groups, key=lambda group: group["name"])


def test_on_remote_storage_events_are_copied_while_the_run_goes_on_and_at_its_end(tmp_path, monkeypatch):
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    from raylight.storage import local_directory

    monkeypatch.setattr(local_directory, "MIN_COPY_INTERVAL_S", 0.0)
    monkeypatch.setattr(local_directory, "MAX_COPY_SHARE", 1e9)
    remote = Storage(f"/{uuid.uuid4().hex}", PyFileSystem(FSSpecHandler(fsspec.filesystem("memory"))))
    board = TensorBoard(remote)
    local = board.path
    board.log_metrics({"loss": 1.0}, 1)
    board.flush()
    (entry,) = remote.list()
    board.log_metrics({"loss": 2.0}, 2)
    board.close()
    (tmp_path / entry.name).write_bytes(remote.read_bytes(entry.name))
    assert [e.step for e in load(tmp_path).Scalars("loss")] == [1, 2]
    assert not os.path.exists(local)


def test_hyperparameters_become_numbers_texts_and_booleans():
    import numpy as np

    values = {"a": np.float32(0.5), "b": {"c": {"d": 1}, "empty": {}}, "e": [1, 2], "f": True, "g": "x" * 2000}
    flat = flatten(values)
    assert flat == {"a": 0.5, "b/c/d": 1.0, "b/empty": "{}", "e": "[1, 2]", "f": True, "g": "x" * 2000}
    assert type(flat["f"]) is bool
    assert len(flatten({"object": list(range(10_000))})["object"]) == 500
