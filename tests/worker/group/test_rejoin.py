"""What the ranks that are left do with their state after a failure."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.worker.checkpoint import snapshot as snapshot_module
from tests.faults import FailAt


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch):
        return (self.weight * batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("step", [3, 4])
def test_a_last_checkpoint_waits_for_the_one_in_flight(step, tmp_path, monkeypatch):
    written, closing = [], threading.Event()
    write_file, close = snapshot_module._Snapshot.write_file, snapshot_module.Snapshots.close

    def write(snapshot, *arguments):
        assert closing.wait(30)
        written.append(snapshot.step)
        return write_file(snapshot, *arguments)

    def wait_for(snapshots, *arguments):
        closing.set()
        return close(snapshots, *arguments)

    monkeypatch.setattr(snapshot_module._Snapshot, "write_file", write)
    monkeypatch.setattr(snapshot_module.Snapshots, "close", wait_for)
    with pytest.raises(pl.WorkerFailed):
        pl.fit(
            Net(), DataLoader(TensorDataset(torch.ones(20, 1)), batch_size=2), num_workers=0, use_gpu=False,
            max_epochs=1, storage_path=str(tmp_path), enable_progress_bar=False, enable_model_summary=False,
            checkpoint=pl.Checkpointing(every_n_steps=3), callbacks=[FailAt(0, step, "data", "exception", tmp_path)],
        )  # fmt: skip
    assert written == [at for at in sorted({3, step}) for _ in range(3)]  # files
    assert pl.open_run(str(tmp_path)).last.step == step


class FailBehindStep(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            raise KeyError("behind the step")


@pytest.mark.parametrize("log_every_n_steps", [0, 3])
def test_a_step_that_was_made_counts_though_what_follows_it_fails(log_every_n_steps, tmp_path):
    with pytest.raises(pl.WorkerFailed, match="behind the step"):
        pl.fit(
            Net(), DataLoader(TensorDataset(torch.ones(20, 1)), batch_size=2), num_workers=0, use_gpu=False,
            max_epochs=1, storage_path=str(tmp_path), enable_progress_bar=False, enable_model_summary=False,
            log_every_n_steps=log_every_n_steps, callbacks=[FailBehindStep()],
        )  # fmt: skip
    assert pl.open_run(str(tmp_path)).last.step == 3
