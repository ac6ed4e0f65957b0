"""Which checkpoints are sent to a service, and when."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import raylight as pl
from raylight.loggers.logger import Logger
from raylight.loggers.uploads import Uploads
from raylight.storage.filesystem import Storage


class Sender(Logger):
    """Notes what it would send, and whether it was there."""

    def __init__(self, log_model):
        self.uploads, self.sent, self.kinds = Uploads(log_model), [], set()

    def log_metrics(self, metrics, step=None): ...

    def after_save_checkpoint(self, checkpoint_callback):
        self.kinds.add(type(checkpoint_callback).__name__)
        self._send(self.uploads.take_saved(checkpoint_callback))

    def finalize(self, status):
        self._send(self.uploads.take_rest())

    def _send(self, uploads):
        for upload in uploads:
            with upload.local() as path:
                self.sent.append((upload.name, upload.is_best, Path(path).exists()))


@pytest.mark.parametrize("log_model", [True, "all"])
def test_files_of_a_model_checkpoint_are_sent_once_they_are_written(log_model, train, tmp_path):
    logger = Sender(log_model)
    callback = pl.callbacks.ModelCheckpoint(
        tmp_path / "files", "at-{step}", monitor="val_loss", save_top_k=-1 if log_model == "all" else 1
    )
    train(logger, callbacks=callback)
    assert logger.kinds == {"ModelCheckpoint"}
    assert logger.sent[-1] == (Path(callback.best_model_path).name, True, True)
    assert {name for name, _, _ in logger.sent} == {path.name for path in (tmp_path / "files").iterdir()}


def test_without_one_the_runs_own_are_sent(train):
    logger = Sender(True)
    train(logger)
    assert logger.kinds == {"SavedCheckpoints"}
    assert logger.sent == [("step-00000010", True, True)]


def test_a_checkpoint_is_given_once_and_again_if_it_has_changed(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"a")
    callback = SimpleNamespace(
        save_top_k=1, last_model_path=str(path), current_score=torch.tensor(0.5), monitor="loss",
        best_model_path=str(tmp_path / "gone"),
    )  # fmt: skip
    uploads = Uploads("all")
    (first,) = uploads.take_saved(callback)
    assert (first.name, first.score, first.is_best, first.aliases) == ("last.ckpt", 0.5, False, ["latest"])
    assert first.metadata == {
        "score": 0.5,
        "original_filename": "last.ckpt",
        "ModelCheckpoint": {"save_top_k": 1, "monitor": "loss"},
    }
    assert uploads.take_saved(callback) == []
    os.utime(path, (1, 1))
    assert len(uploads.take_saved(callback)) == 1
    assert Uploads(False).take_saved(callback) == Uploads(False).take_rest() == []


def test_one_on_remote_storage_is_fetched(proxy):
    remote = Storage(proxy.uri("uploads"))
    remote.write("step-1/manifest.json", [b"{}"])
    callback = SimpleNamespace(save_top_k=1, best_model_path=remote.uri_of("step-1"), best_model_score=None)
    (upload,) = Uploads("all").take_saved(callback)
    with upload.local() as path:
        assert (Path(path).name, Path(path, "manifest.json").read_bytes()) == ("step-1", b"{}")
    assert not Path(path).exists()
