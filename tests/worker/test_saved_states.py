"""Which states of a run are on storage: judged by what was trained, not by the number of optimizer steps."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl

QUIET = {"num_workers": 0, "use_gpu": False, "enable_progress_bar": False, "enable_model_summary": False}
NUM_BATCHES = 4


class ByHand(pl.Module):
    """Counts batches in a weight, which no optimizer of raylight's steps."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.finish_copying()  # so that what is copied is not written into
        for thread in threading.enumerate():  # and none is left out
            if thread.name == "snapshot":
                thread.join()

    def training_step(self, batch):
        with torch.no_grad():
            self.bias += 1.0

    def configure_optimizers(self):
        return None


class Raw(ByHand):
    """Steps past raylight, which counts no step then."""

    def training_step(self, batch):
        self.bias.grad = -torch.ones(1)
        self.optimizers(use_pl_optimizer=False).step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Seldom(Raw):
    """Steps in the third of four batches; after it only a buffer moves."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.bias += 1.0
        if batch_idx == 2:
            self.bias.grad = torch.zeros(1)
            self.optimizers().step()


class Twice(ByHand):
    """Two steps a batch."""

    def training_step(self, batch):
        with torch.no_grad():
            self.bias += 1.0
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=1.0) for _ in range(2)]


def fit(module, path, **arguments):
    loader = DataLoader(TensorDataset(torch.zeros(NUM_BATCHES, 1)))
    arguments = {"max_epochs": 3, **QUIET, **arguments}
    return pl.fit(module, loader, storage_path=str(path), **arguments)


WORKERS = [0, pytest.param(2, marks=[pytest.mark.ray, pytest.mark.slow])]


@pytest.mark.parametrize("kind", [ByHand, Raw, Seldom, Twice])
def test_the_last_checkpoint_holds_what_was_trained(kind, tmp_path):
    options = pl.Checkpointing(every_n_steps=1, every_n_epochs=1, keep_last=-1)
    result = fit(kind(), tmp_path, checkpoint=options)
    assert kind.load_from_checkpoint(result.last_checkpoint.path).bias.item() == 12.0
    held = [kind.load_from_checkpoint(checkpoint.path).bias.item() for checkpoint in result.checkpoints]
    assert held == sorted(held)
    assert {4.0, 8.0, 12.0} <= set(held)
    again = kind()
    assert fit(again, tmp_path, max_epochs=4, resume="last", checkpoint=options).num_epochs == 4
    assert again.bias.item() == 16.0


@pytest.mark.parametrize("num_workers", WORKERS)
def test_by_hand_with_every_number_of_workers(num_workers, tmp_path, request):
    if num_workers:
        request.getfixturevalue("ray_cluster")
    result = fit(ByHand(), tmp_path, num_workers=num_workers)
    loaded = ByHand.load_from_checkpoint(result.last_checkpoint.path)
    assert loaded.bias.item() == 3.0 * NUM_BATCHES / max(num_workers, 1)


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [2, 4, 6, 8]), (2, [2, 4, 6, 8]), (3, [4, 6, 8]), (5, [6, 8]), (7, [8])]
)
def test_a_step_that_was_named_is_passed_not_hit(every, expected, tmp_path):
    options = pl.Checkpointing(every_n_steps=every, keep_last=-1)
    result = fit(Twice(), tmp_path, max_epochs=1, checkpoint=options)
    assert [checkpoint.step for checkpoint in result.checkpoints] == expected
