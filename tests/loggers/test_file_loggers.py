"""Loggers by Lightning's names, and anything else that has `log_metrics`."""

from __future__ import annotations

import contextlib
import csv
import pickle
import shutil
import uuid
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import raylight as pl
from raylight.contract.errors import InvalidArguments, StorageError
from raylight.loggers import CSVLogger, Logger, TensorBoardLogger
from raylight.loggers.opening import make_loggers
from raylight.storage import local_directory
from raylight.storage.filesystem import Storage
from raylight.storage.retry import Backoff
from tests.faults_storage import Fault


@pytest.fixture
def files(tmp_path) -> Storage:
    return Storage(tmp_path / "runs" / "default" / "version_0")


def start(setting, files: Storage) -> list:
    return make_loggers(setting, files)


def scalars(path, name: str) -> list[tuple[int, float]]:
    loaded = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in loaded.Scalars(name)]


def rows(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_true_is_tensorboard_in_the_version_and_false_is_nothing(files):
    (logger,) = start(True, files)
    assert isinstance(logger, TensorBoardLogger)
    assert logger.log_dir == files.uri
    logger.log_metrics({"loss": torch.tensor(0.5), "n": 3}, 7)
    logger.log_hyperparams({"lr": 0.1}, {"hp": 1.0})
    logger.finalize("success")
    assert scalars(files.uri, "loss") == [(7, 0.5)]
    assert scalars(files.uri, "n") == [(7, 3.0)]
    assert scalars(files.uri, "hp") == [(0, 1.0)]
    assert start(False, files) == start(None, files) == start([], files) == []


def test_any_object_with_log_metrics_is_taken_as_it_is(files):
    class Own:
        def log_metrics(self, metrics, step):
            raise AssertionError("not called here")

    own, other = Own(), Own()
    assert start(own, files) == [own]
    assert start((own, other), files) == [own, other]


def test_lightnings_own_logger_works(files, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    (logger,) = start(lightning.loggers.CSVLogger(str(tmp_path / "theirs")), files)
    logger.log_metrics({"loss": 0.5}, 1)
    logger.save()
    logger.finalize("success")
    assert rows(tmp_path / "theirs" / "lightning_logs" / "version_0" / "metrics.csv")[0]["loss"] == "0.5"


def test_a_logger_derived_from_ours_needs_log_metrics_alone(files):
    class Own(pl.loggers.Logger):
        def __init__(self) -> None:  # as Lightning's users do, without calling the one of Logger
            self.seen: list = []

        def log_metrics(self, metrics, step=None):
            self.seen.append((metrics, step))

    (own,) = start(Own(), files)
    assert own.experiment is own
    own.log_metrics({"a": 1.0}, 2)
    own.log_hyperparams({"lr": 0.1})
    own.save()
    own.finalize("success")
    assert own.seen == [({"a": 1.0}, 2)]
    assert isinstance(own, Logger)


def test_save_dir_name_and_version_are_lightnings(files, tmp_path):
    for expected in ("version_0", "version_1"):
        (logger,) = start(TensorBoardLogger(tmp_path / "tb", name="exp"), files)
        assert logger.log_dir == str(tmp_path / "tb" / "exp" / expected)
        logger.log_metrics({"loss": 1.0}, 1)
        logger.finalize("success")
        assert scalars(logger.log_dir, "loss") == [(1, 1.0)]
    assert (logger.name, logger.version, logger.save_dir) == ("exp", 1, str(tmp_path / "tb"))
    for version, folder in ((7, "version_7"), ("mine", "mine")):
        (logger,) = start(CSVLogger(tmp_path / "tb", name="exp", version=version), files)
        assert logger.log_dir == str(tmp_path / "tb" / "exp" / folder)
        logger.finalize("success")
    (logger,) = start(TensorBoardLogger(tmp_path / "tb", name=""), files)
    assert logger.log_dir == str(tmp_path / "tb" / "version_0")
    logger.finalize("success")
    (logger,) = start(TensorBoardLogger(tmp_path / "tb", name="exp", version=9, sub_dir="a"), files)
    assert logger.log_dir == str(tmp_path / "tb" / "exp" / "version_9" / "a")
    logger.finalize("success")
    assert files.list() == []


def test_a_logger_that_is_used_for_two_fits(files):
    logger = TensorBoardLogger()
    for number in range(2):
        start(logger, files.parent().child(f"version_{number}"))
        logger.log_metrics({"loss": float(number)}, 1)
        logger.finalize("success")
    assert scalars(files.uri, "loss") == [(1, 0.0)]
    assert scalars(files.parent().child("version_1").uri, "loss") == [(1, 1.0)]


def test_prefix_and_a_step_that_is_left_out(files):
    (logger,) = start(TensorBoardLogger(prefix="a"), files)
    logger.log_metrics({"loss": 1.0})
    logger.log_metrics({"loss": 2.0}, 5)
    logger.log_metrics({"loss": 3.0})
    logger.finalize("success")
    assert scalars(files.uri, "a-loss") == [(0, 1.0), (5, 2.0), (6, 3.0)]


def test_the_time_of_measurement_is_kept(files):
    (logger,) = start(True, files)
    logger.log_metrics({"loss": 1.0}, 1, seconds=1.7e9)
    logger.finalize("success")
    loaded = EventAccumulator(files.uri, size_guidance={"scalars": 0}).Reload()
    assert loaded.Scalars("loss")[0].wall_time == 1.7e9


def test_experiment_is_a_summary_writer_in_the_same_directory(files):
    (logger,) = start(TensorBoardLogger(max_queue=5), files)
    logger.experiment.add_text("note", "hello", 1)
    assert logger.experiment is logger.experiment
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("success")
    tags = EventAccumulator(files.uri).Reload().Tags()
    assert tags["scalars"] == ["loss"]
    assert tags["tensors"] == ["note/text_summary"]


def test_steps_that_are_redone_are_in_both_files_once(files):
    loggers = start([TensorBoardLogger(), CSVLogger()], files)
    for logger in loggers:
        for step in (1, 2, 3):
            logger.log_metrics({"loss": 1.0}, step)
        logger.drop_after(1)
        logger.log_metrics({"loss": 2.0}, 2)
        logger.save()
        logger.finalize("success")
    assert scalars(files.uri, "loss") == [(1, 1.0), (2, 2.0)]
    assert [(row["step"], row["loss"]) for row in rows(files.local_path("metrics.csv"))] == [("1", "1.0"), ("2", "2.0")]


def test_csv_and_hyperparameters(files):
    import argparse

    (logger,) = start(CSVLogger(), files)
    logger.log_hyperparams(argparse.Namespace(lr=0.1, kind=int))
    logger.log_metrics({"loss": 0.5, "epoch": 0.0}, 1)
    logger.log_metrics({"val_loss": 0.25, "epoch": 0.0}, 1)
    logger.finalize("success")
    assert rows(files.local_path("metrics.csv")) == [
        {"loss": "0.5", "epoch": "0.0", "step": "1", "val_loss": ""},
        {"loss": "", "epoch": "0.0", "step": "1", "val_loss": "0.25"},
    ]
    assert yaml.safe_load(files.read_bytes("hparams.yaml")) == {"lr": 0.1, "kind": "int"}


def test_a_csv_on_remote_storage_goes_on_when_the_version_is_resumed():
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    remote = Storage(f"/{uuid.uuid4().hex}", PyFileSystem(FSSpecHandler(fsspec.filesystem("memory"))))
    for step in (1, 2):
        (logger,) = start(CSVLogger(), remote)
        logger.log_metrics({"loss": float(step)}, step)
        logger.finalize("success")
    assert remote.read_bytes("metrics.csv").decode().split() == ["loss,step", "1.0,1", "2.0,2"]


def test_earlier_rows_that_could_not_be_read_at_first_are_kept(proxy):
    remote = Storage(proxy.uri(uuid.uuid4().hex), backoff=Backoff(num_attempts=1))
    for step in (1, 2):
        (logger,) = start(CSVLogger(), remote)
        proxy.inject(*[Fault("500", method="GET", path="metrics.csv")] * (step == 2))
        logger.log_metrics({"loss": float(step)}, step)
        with contextlib.suppress(StorageError):
            logger.save()
        logger.log_metrics({"loss": float(step)}, step)
        logger.finalize("success")
    assert [request[0] for request in proxy.requests if "metrics.csv" in request[1]].count("GET") == 2
    assert remote.read_bytes("metrics.csv").decode().split() == ["loss,step", "1.0,1", "1.0,1", "2.0,2", "2.0,2"]


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_where_storage_stays_away_the_person_is_told_where_the_files_are(proxy, monkeypatch, kind):
    monkeypatch.setattr(local_directory, "MIN_COPY_INTERVAL_S", 0.0)  # so that a copy is due when the rows are written
    proxy.inject(Fault("500", count=1000, method="PUT"))
    remote = Storage(proxy.uri(uuid.uuid4().hex), backoff=Backoff(num_attempts=1))
    (logger,) = start(kind(), remote)
    logger.log_metrics({"loss": 1.0}, 1)
    with pytest.raises(StorageError, match="What could not be copied is kept in") as caught:
        logger.finalize("success")
    folder = Path(str(caught.value).rpartition("kept in ")[2])
    if kind is CSVLogger:
        assert [row["loss"] for row in rows(folder / "metrics.csv")] == ["1.0"]
    else:
        assert scalars(folder, "loss") == [(1, 1.0)]
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_logger_can_be_sent_to_another_process_where_it_is_not_attached(files, kind):
    (logger,) = start(kind(prefix="a"), files)
    logger.log_metrics({"loss": 1.0}, 1)
    copy = pickle.loads(pickle.dumps(logger))
    assert copy.log_dir is None
    with pytest.raises(RuntimeError, match="pass it as Trainer"):
        copy.log_metrics({"loss": 1.0}, 1)
    logger.finalize("success")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorBoardLogger(name="exp"), "name and version need save_dir"),
        (lambda: CSVLogger(version=3), "name and version need save_dir"),
        (lambda: TensorBoardLogger("tb", flush_sec=3), "did you mean 'flush_secs'"),
        (lambda: TensorBoardLogger("tb", quite_other=1), "no argument 'quite_other'"),
    ],
)
def test_wrong_arguments_say_what_is_right(make, message):
    with pytest.raises(InvalidArguments, match=message):
        make()


def test_a_value_that_is_no_number_is_named(files):
    (logger,) = start(True, files)
    with pytest.raises(InvalidArguments, match="'image' is no number but Tensor"):
        logger.log_metrics({"image": torch.zeros(2, 2)}, 1)
    logger.finalize("failed")
