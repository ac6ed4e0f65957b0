"""What Ray's dashboard calls the workers of a fit, and which version they are called after."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.launch import ray_actors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class Net(pl.Module):
    """Its rank 0 dies once, if told where to note that."""

    def __init__(self, note: Path | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.note = note

    def on_train_start(self) -> None:
        if self.note is not None and self.trainer.global_rank == 0 and not self.note.exists():
            self.note.touch()
            os._exit(1)

    def training_step(self, batch):
        return self.layer(batch[0]).pow(2).mean()

    def predict_step(self, batch):
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


DATA = DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2)


def make_trainer(path: Path, **arguments: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    place = {"storage_path": str(path), "name": "named", "num_workers": 2, "use_gpu": False, "num_standby": 0}
    return pl.Trainer(**{"max_epochs": 1, **quiet, **place, **arguments})


def names() -> set[str]:
    """Of raylight's actors that live."""
    named = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in named if name.startswith("raylight:")}


def test_actors_carry_the_version_that_they_were_started_for(tmp_path: Path) -> None:
    ray_actors.release_all()
    for _ in range(2):  # the second fit has the workers of the first
        make_trainer(tmp_path).fit(Net(), DATA)
        assert names() == {"raylight:named:v0:rank0", "raylight:named:v0:rank1"}
    make_trainer(tmp_path).fit(Net(tmp_path / "died"), DATA)
    assert names() == {"raylight:named:v2:rank0", "raylight:named:v0:rank1"}


@pytest.mark.soak
def test_of_a_run_that_goes_on_and_of_one_that_writes_nothing(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit(Net(), DATA)
    ray_actors.release_all()
    make_trainer(tmp_path, max_epochs=2).fit(Net(), DATA, ckpt_path="last")
    assert names() == {"raylight:named:v0:rank0", "raylight:named:v0:rank1"}
    ray_actors.release_all()
    make_trainer(tmp_path).predict(Net(), DATA)
    assert names() == {"raylight:named:rank0", "raylight:named:rank1"}


def test_without_room_no_version_is_claimed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, resources_per_worker={"licence": 1})
    with pytest.raises(pl.NotEnoughResources, match="licence"):
        trainer.fit(Net(), DATA)
    assert not list(tmp_path.rglob("version_*"))


def test_a_start_that_fails_gives_the_workers_back(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit(Net(), DATA)
    before = names()
    (tmp_path / "file").touch()
    with pytest.raises(pl.StorageError):
        make_trainer(tmp_path / "file").fit(Net(), DATA)
    make_trainer(tmp_path).fit(Net(), DATA)
    assert names() == before
    versions = [json.loads(file.read_text())["status"] for file in (tmp_path / "named").glob("version_*/run.json")]
    assert versions == ["finished"] * 2
