"""What a person gives as a number may be a tensor or a scalar of numpy, everywhere."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch

import raylight as pl
from raylight.contract.plain_numbers import to_python, with_python_numbers
from raylight.worker.step.optimizers import make_optimizers

KINDS = [torch.tensor, np.array, lambda value: np.array(value)[()]]


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_the_trainer(kind):
    given = {
        "max_epochs": 3, "limit_train_batches": 0.5, "val_check_interval": 2, "gradient_clip_val": 0.25, "seed": 7,
        "deterministic": True, "accumulate_grad_batches": 2, "precision": 32, "hang_timeout_s": 20.0, "num_workers": 0,
    }  # fmt: skip
    config = pl.Trainer(
        **{name: kind(value) for name, value in given.items()}, checkpoint={"every_n_steps": kind(5)},
        max_time={"hours": kind(2)},
    ).config  # fmt: skip
    expected = pl.Trainer(**given, checkpoint={"every_n_steps": 5}, max_time=timedelta(hours=2)).config
    for name in ("limit_train_batches", "max_epochs", "seed", "precision", "checkpoint", "max_time_s", "deterministic"):
        assert getattr(config, name) == getattr(expected, name)
        assert type(getattr(config, name)) is type(getattr(expected, name))
    with pytest.raises(pl.InvalidArguments, match="max_epochs must be a whole number"):
        pl.Trainer(max_epochs=kind(0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_callbacks_and_schedulers(kind):
    stopping = pl.callbacks.EarlyStopping("loss", patience=kind(4), min_delta=kind(0.5))
    assert (type(stopping.patience), stopping.patience, stopping.min_delta) == (int, 4, 0.5)
    saving = pl.callbacks.ModelCheckpoint(every_n_train_steps=kind(3), save_top_k=kind(-1))
    assert (saving.checkpointing().every_n_steps, saving.save_top_k) == (3, -1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    given = {"scheduler": scheduler, "frequency": kind(2)}
    _, (config,) = make_optimizers({"optimizer": optimizer, "lr_scheduler": given})
    assert config.frequency == 2
    with pytest.raises(pl.InvalidArguments, match="patience"):
        pl.callbacks.EarlyStopping("loss", patience=kind(0.5))


class Net(pl.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = torch.nn.Linear(1, 1), kind

    def training_step(self, batch, batch_idx):
        kind = self.kind
        flags = {"on_step": kind(False), "on_epoch": kind(True)}
        self.log("loss", kind(float(batch_idx)), batch_size=kind(1 + batch_idx), **flags)
        self.logger.log_metrics({"own": kind(2.0)}, step=kind(1))
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_sizes_that_are_logged(kind, tmp_path):
    loader = torch.utils.data.DataLoader(torch.ones(4, 1), batch_size=2)
    result = pl.fit(
        Net(kind), loader, num_workers=0, max_epochs=1, storage_path=str(tmp_path), enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    assert result.metrics == {"loss": pytest.approx(2 / 3), "own": 2.0}
    assert {type(row["value"]) for row in result.history().to_pylist()} == {float}


def test_what_is_no_number_stays_as_it_is():
    vector, module = torch.ones(2), torch.nn.Linear(1, 1)
    assert to_python(vector) is vector
    assert to_python(module) is module
    assert to_python(np.float64) is np.float64
    assert with_python_numbers({"a": [np.int64(1), (torch.tensor(2.0), "x")]}) == {"a": [1, (2.0, "x")]}
