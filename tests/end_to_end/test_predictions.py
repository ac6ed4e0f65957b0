"""What predict holds in memory, in this process and with two workers."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import raylight as pl

NUM_BATCHES = 12
QUIET = {"enable_progress_bar": False, "logger": False, "use_gpu": False}


class Prediction:
    def __init__(self, batch: torch.Tensor):
        self.values = batch * 2


class Net(pl.Module):
    """Notes how many of its predictions are alive when it makes another."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.made: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "made": []}

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> Prediction:
        with (self.folder / f"alive-{self.global_rank}").open("a") as file:
            file.write(f"{sum(made() is not None for made in self.made)}\n")
        made = Prediction(batch)
        self.made.append(weakref.ref(made))
        return made


def predict(net: Net, num_workers: int, **arguments: Any) -> tuple[pl.Trainer, list[Any]]:
    trainer = pl.Trainer(num_workers=num_workers, storage_path=str(net.folder), **QUIET)
    return trainer, trainer.predict(net, DataLoader(range(NUM_BATCHES), batch_size=1), **arguments)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_predictions_that_nobody_wants_back_are_not_kept(
    num_workers: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if num_workers:
        request.getfixturevalue("ray_cluster")
    net = Net(tmp_path)
    _, found = predict(net, num_workers, return_predictions=False)
    assert found == []
    for rank in range(max(num_workers, 1)):
        alive = (tmp_path / f"alive-{rank}").read_text().split()
        assert alive == ["0"] * (NUM_BATCHES // max(num_workers, 1))


def test_predictions_that_were_returned_live_as_long_as_the_caller_keeps_them(tmp_path: Path) -> None:
    net = Net(tmp_path)
    trainer, found = predict(net, 0)
    assert [made.values.item() for made in found] == list(range(0, 2 * NUM_BATCHES, 2))
    del found
    gc.collect()
    assert trainer.callback_metrics == {}
    assert not any(made() for made in net.made)
