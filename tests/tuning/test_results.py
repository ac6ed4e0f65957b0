"""Which trial of a sweep is the best, and what a checkpoint of Ray Tune leads to."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from torch import nn
from torch.utils.data import DataLoader

import raylight
from raylight.loading import find_resume
from raylight.storage.filesystem import Storage
from raylight.tuning.best_trial import find_best
from raylight.tuning.results import SweepResults


def make_results(mode: str, *last: dict[str, Any]) -> SweepResults:
    grid = SimpleNamespace(_results=[SimpleNamespace(metrics=metrics) for metrics in last])
    return SweepResults.of(grid, "loss", mode)


@pytest.mark.parametrize(
    ("mode", "last", "best"),
    [
        ("min", [{"loss": 5.0, "best_loss": 2.0}, {"loss": 3.0, "best_loss": 3.0}], 0),
        ("max", [{"loss": 5.0, "best_loss": 5.0}, {"loss": 3.0, "best_loss": 6.0}], 1),
        ("min", [{"loss": 2.0}, {"loss": 1.0}], 1),  # without checkpoints
        ("min", [{"loss": math.nan}, {"loss": math.inf}, {"loss": 1.0}, {}], 2),
        ("min", [{"loss": math.nan, "best_loss": 1.0}, {"loss": 2.0, "best_loss": 2.0}], 0),
    ],
)
def test_the_best_trial_holds_the_best_checkpoint(mode: str, last: list[dict[str, Any]], best: int) -> None:
    results = make_results(mode, *last)
    assert results.get_best_result() is results[best]
    assert results.get_best_result("loss", mode) is results[best]
    assert find_best(results, "loss") is results[best]


@pytest.mark.parametrize("last", [{"loss": math.nan}, {}])
def test_a_best_needs_a_number(last: dict[str, Any]) -> None:
    assert find_best(make_results("min", last), "loss") is None


class Told(raylight.Module):
    """Its validation says what the configuration says."""

    def __init__(self, losses: tuple[float, ...]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.weight - self.hparams.losses[0]).square().sum()

    def validation_step(self, batch: torch.Tensor) -> None:
        self.log("val_loss", self.hparams.losses[self.current_epoch])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
def test_a_trial_that_got_worse_is_still_the_best_and_tunes_own_checkpoints_load(
    ray_cluster: Any, tmp_path: Path
) -> None:
    loader = DataLoader(torch.ones(4, 1))
    results = raylight.sweep(
        Told, {"losses": tune.grid_search([(9.0, 2.0, 9.0, 5.0), (9.0, 3.0, 9.0, 3.0)])}, num_samples=1,
        metric="val_loss", mode="min", data=(loader, loader), num_workers=1, max_epochs=4, check_val_every_n_epoch=2,
        num_sanity_val_steps=0, scheduler=ASHAScheduler(grace_period=2, max_t=2), storage_path=tmp_path, name="told",
        enable_progress_bar=False,
    )  # fmt: skip
    best = results.get_best_result()
    assert best.metrics["best_val_loss"] == 2.0
    module = Told.load_from_checkpoint(best.metrics["best_checkpoint"])
    assert module.hparams.losses[1] == 2.0
    assert results.get_best_result(scope="last").metrics["val_loss"] == 3.0

    newest = raylight.open_run(best.metrics["version"]).last
    expected = Told.load_from_checkpoint(newest).weight
    for given in (best.checkpoint, best.checkpoint.path, Path(best.checkpoint.path), tune.Checkpoint(newest.path)):
        assert torch.equal(Told.load_from_checkpoint(given).weight, expected)
        assert find_resume(given, Storage(tmp_path), "told").checkpoint.step == newest.step
    moved = shutil.move(tmp_path / "told", tmp_path / "moved")
    inside = Path(best.checkpoint.path).relative_to(tmp_path / "told")
    assert torch.equal(Told.load_from_checkpoint(Path(moved) / inside).weight, expected)
