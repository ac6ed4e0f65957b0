"""What `resume` and `ckpt_path` lead to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import raylight as pl
from raylight.driver.result import Result
from raylight.errors import CheckpointCorrupt
from raylight.loading import find_resume
from raylight.storage import checkpoints as store
from raylight.storage.checkpoints import Checkpoint, Manifest
from raylight.storage.filesystem import Storage
from raylight.storage.versions import Version, claim_version


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


@pytest.fixture
def version(storage: Storage) -> Version:
    version = claim_version(storage, "run")
    version.write_run({"seed": 7, "arguments": {"checkpoint": {"monitor": "val_loss", "mode": "min"}}})
    return version


def save(version: Version, step: int, val_loss: float) -> Checkpoint:
    directory = store.directory_of(step)
    files = (version.storage.write(f"{directory}/model-00000-of-00001.pt", [b"weights"]),)
    return store.commit(version.storage, directory, Manifest(step, 0, files, metrics={"val_loss": val_loss}))


def damage(checkpoint: Checkpoint) -> None:
    for path in Path(checkpoint.path).glob("model-*.pt"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # of the same size
        path.write_bytes(content)


def make_result(version: Version, checkpoints: list[Checkpoint], best: Checkpoint) -> Result:
    return Result("finished", {}, version.path, best, checkpoints[-1], checkpoints, 30, 1, version=version)


# ---- damage


@pytest.mark.parametrize("after_a_fit", [False, True])
def test_best_is_the_best_that_is_whole(
    storage: Storage, version: Version, after_a_fit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = [save(version, 10, 3.0), save(version, 20, 1.0), save(version, 30, 2.0)]
    previous = make_result(version, checkpoints, checkpoints[1]) if after_a_fit else None
    assert find_resume("best", storage, "run", previous).checkpoint.step == 20
    damage(checkpoints[1])
    with caplog.at_level(logging.WARNING, "raylight.storage"):
        assert find_resume("best", storage, "run", previous).checkpoint.step == 30
    assert f"{checkpoints[1].path} is damaged" in caplog.text


def test_where_no_checkpoint_of_a_fit_is_whole_another_fits_best_is_not_taken(
    storage: Storage, version: Version
) -> None:
    save(version, 10, 1.0)
    newer = claim_version(storage, "run")
    newest = save(newer, 20, 2.0)
    damage(newest)
    with pytest.raises(CheckpointCorrupt, match=r"none of the checkpoints of .*version_1 is whole"):
        find_resume("best", storage, "run", make_result(newer, [newest], newest))


@pytest.mark.parametrize("as_path", [False, True])
def test_a_damaged_checkpoint_that_was_named_is_an_error(storage: Storage, version: Version, as_path: bool) -> None:
    checkpoint = save(version, 10, 1.0)
    damage(checkpoint)
    with pytest.raises(CheckpointCorrupt, match="has other bytes than were written"):
        find_resume(checkpoint.path if as_path else checkpoint, storage, "run")


class Net(pl.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.net(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_test_after_a_fit_does_not_measure_damaged_weights(tmp_path: Path) -> None:
    loader = DataLoader(torch.ones(8, 2), batch_size=4)
    trainer = pl.Trainer(
        num_workers=0, max_epochs=1, storage_path=str(tmp_path), enable_progress_bar=False, enable_model_summary=False
    )
    result = trainer.fit(Net(), loader)
    assert trainer.test(dataloaders=loader)
    damage(result.best_checkpoint)
    with pytest.raises(CheckpointCorrupt, match="is whole"):
        trainer.test(dataloaders=loader)
