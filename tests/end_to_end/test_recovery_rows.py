"""What was logged survives failures: each step has one row, with the value of all ranks, in every logger."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from tests.faults import FailAt

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("seen", batch[1].sum(), reduce_fx="sum", on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).pow(2).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Service:
    """A logger that cannot take anything back."""

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows += [(name, step, value) for name, value in metrics.items() if name != "epoch"]


def fit(folder: Path, faults: list[FailAt], num_workers: int | tuple[int, int] = 2, **arguments):
    """Six steps an epoch, of which the last has one sample."""
    folder.mkdir(exist_ok=True)
    data = TensorDataset(torch.randn(41, 4, generator=torch.Generator().manual_seed(1)), torch.arange(41.0))
    service = Service()
    result = pl.fit(
        Net(), DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=8), num_workers=num_workers,
        use_gpu=False, seed=5, storage_path=str(folder), enable_progress_bar=False, enable_model_summary=False,
        callbacks=faults, log_every_n_steps=1, max_restarts=9, max_epochs=3, logger=service, **arguments,
    )  # fmt: skip
    rows = [(row["name"], row["step"], row["value"]) for row in result.history().to_pylist()]
    return sorted(rows), sorted(service.rows), result


def test_each_value_is_written_once_and_is_that_of_all_ranks(tmp_path, capsys):
    expected, logged, _ = fit(tmp_path / "whole", [])
    assert logged == expected
    faults = [
        FailAt(1, 2, "optimizer", "exception", tmp_path),  # rank 0 has made the step
        FailAt(0, 4, "after_step", "exception", tmp_path),
        FailAt(0, 6, "epoch_end", "exception", tmp_path),
        FailAt(1, 8, "data", "exception", tmp_path),
        FailAt(1, 12, "validation", "kill", tmp_path),
        *(FailAt(rank, 15, "data", "kill", tmp_path) for rank in range(2)),  # back to the checkpoint of step 12
    ]
    rows, logged, result = fit(tmp_path / "disturbed", faults)
    assert result.num_restarts == 6
    assert rows == logged
    assert (set(rows) - set(expected), set(expected) - set(rows)) == (set(), set())
    assert rows == expected
    assert "alone" not in capsys.readouterr().out


class Reports(pl.Callback):
    """Lets a rank tell nothing before its first validation."""

    def setup(self, trainer, module, stage):
        from raylight.worker import loop

        self.usual, loop.REPORT_EVERY_S = loop.REPORT_EVERY_S, 1e9

    def teardown(self, trainer, module, stage):
        from raylight.worker import loop

        loop.REPORT_EVERY_S = self.usual


def test_what_dies_with_a_killed_rank_is_said(tmp_path, capsys):
    rows, logged, _ = fit(tmp_path, [FailAt(1, 4, "data", "kill", tmp_path), Reports()])
    assert rows == logged
    assert len({(name, step) for name, step, _ in rows}) == len(rows)
    assert sorted(step for name, step, _ in rows if name == "loss_step") == list(range(1, 19))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("is that of the other ranks alone: rank 1 ended before saying its part") == 1
