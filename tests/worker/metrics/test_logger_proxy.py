"""What a module gives to `self.logger.experiment` lies with the other events of its version, wherever that is."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.loggers import TensorBoardLogger
from raylight.report import tensorboard
from raylight.storage import local_directory
from raylight.storage.filesystem import Storage
from raylight.storage.retry import Backoff
from tests.faults_storage import Fault, FaultProxy, uri_at


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        self.logger.experiment.add_text(f"rank {self.global_rank}", f"batch {batch_idx}", self.global_step)
        self.logger.log_metrics({"by_hand": float(batch_idx)})
        return self.net(batch[0]).square().mean()

    def on_train_end(self):
        if self.global_rank:
            return
        self.logger.experiment.add_histogram("weights", self.net.weight, self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return uri_at(request.getfixturevalue("s3_port"), uuid.uuid4().hex)
    return str(tmp_path)


def read_events(uri: str, folder: Path) -> EventAccumulator:
    storage = Storage(uri)
    for entry in storage.walk():
        if "tfevents" in entry.name:
            (folder / entry.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / entry.name).write_bytes(storage.read_bytes(entry.name))
    events = EventAccumulator(str(folder))
    return events.Reload()


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_texts_and_histograms_are_stored(place, num_workers, tmp_path, request):
    if num_workers:
        request.getfixturevalue("ray_cluster")
    loader = DataLoader(TensorDataset(torch.randn(16, 2)), batch_size=2)
    result = pl.fit(Net(), loader, num_workers=num_workers, use_gpu=False, max_epochs=1, storage_path=place)
    events = read_events(result.path, tmp_path / "fetched")
    ranks = range(max(1, num_workers))
    assert sorted(events.Tags()["tensors"]) == [f"rank {rank}/text_summary" for rank in ranks]
    for rank in ranks:  # each in its order
        assert [event.step for event in events.Tensors(f"rank {rank}/text_summary")] == list(range(8 // len(ranks)))
    assert events.Tags()["histograms"] == ["weights"]
    assert "by_hand" in {row["name"] for row in result.history().to_pylist()}


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_curves_that_share_a_chart_are_stored_too(place, tmp_path):
    """`add_scalars` writes each curve to a folder of its own."""

    class Comparing(Net):
        def on_train_end(self):
            self.logger.experiment.add_scalars("accuracy", {"train": 0.75, "val": 0.5}, self.global_step)

    loader = DataLoader(TensorDataset(torch.randn(4, 2)), batch_size=2)
    result = pl.fit(Comparing(), loader, num_workers=0, use_gpu=False, max_epochs=1, storage_path=place)
    events = read_events(result.path, tmp_path / "fetched")
    assert len(events.Tensors("rank 0/text_summary")) == 2
    for name, value in (("train", 0.75), ("val", 0.5)):
        curve = EventAccumulator(str(tmp_path / "fetched" / f"accuracy_{name}")).Reload()
        assert [(event.step, event.value) for event in curve.Scalars("accuracy")] == [(2, value)]


def test_a_run_that_fails_has_stored_them_too(s3_port, tmp_path):
    class Failing(Net):
        def on_train_end(self):
            raise ValueError("at the end")

    place = uri_at(s3_port, uuid.uuid4().hex)
    loader = DataLoader(TensorDataset(torch.randn(4, 2)), batch_size=2)
    with pytest.raises(pl.WorkerFailed):
        pl.fit(Failing(), loader, num_workers=0, max_epochs=1, storage_path=place, name="failing")
    assert len(read_events(pl.open_run(place).path, tmp_path).Tensors("rank 0/text_summary")) == 2


def test_after_an_outage_copying_goes_on(s3_port, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tensorboard, "WRITE_INTERVAL_S", 0.02)
    monkeypatch.setattr(local_directory, "MIN_COPY_INTERVAL_S", 0.0)
    monkeypatch.setattr(local_directory, "MAX_COPY_SHARE", 1e9)
    proxy = FaultProxy(s3_port)
    files = Storage(proxy.uri(uuid.uuid4().hex), backoff=Backoff(num_attempts=1))
    logger = TensorBoardLogger(flush_secs=0.01)
    logger.attach(files)

    def count_told() -> int:
        return sum("cannot write" in text for text in caplog.messages)

    def wait_for(reached) -> None:
        deadline = time.monotonic() + 30
        while not reached():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    try:
        for outage in (1, 2):
            proxy.inject(Fault("500", count=1000, method="PUT"))
            logger.experiment.add_text(f"outage {outage}", "hello")
            wait_for(lambda: len(proxy.requests) > 10)  # three tries of three requests each
            wait_for(lambda outage=outage: count_told() == outage)
            proxy.inject()
            logger.experiment.flush()
            wait_for(lambda n=outage: len(read_events(files.uri, tmp_path).Tags()["tensors"]) == n)
        logger.finalize("success")
        assert count_told() == 2
    finally:
        proxy.close()
