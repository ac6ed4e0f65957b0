"""What the training loop does around the steps."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.worker.checkpoint import snapshot as snapshot_module

QUIET = {"num_workers": 0, "use_gpu": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_loader(num_samples: int = 12, batch_size: int = 2, **options) -> DataLoader:
    inputs = torch.arange(float(num_samples)).unsqueeze(1)
    return DataLoader(TensorDataset(inputs), batch_size=batch_size, **options)


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.validated_at: list[int] = []

    def training_step(self, batch):
        return (self.weight * batch[0]).mean()

    def validation_step(self, batch):
        self.log("val_loss", (self.weight * batch[0]).mean())

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.validated_at.append(self.trainer.num_batches_seen)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.001)


def fit(module: pl.Module, path, loader=None, val=None, **arguments):
    return pl.fit(module, loader or make_loader(), val, storage_path=str(path), **{**QUIET, **arguments})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 2}, [6, 12]),
        ({"max_epochs": 2, "val_check_interval": 0.5}, [3, 6, 9, 12]),
        ({"max_epochs": 2, "val_check_interval": 4}, [4, 10]),
        ({"max_epochs": 2, "val_check_interval": 4, "check_val_every_n_epoch": None}, [4, 8, 12]),
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, [12, 24]),
        ({"max_epochs": 1, "limit_val_batches": 0}, []),
    ],
)
def test_when_it_validates(arguments, expected, tmp_path):
    module = Net()
    fit(module, tmp_path, val=make_loader(4), **arguments)
    assert module.validated_at == expected


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        ({"max_epochs": 3}, 18, 3),
        ({"max_steps": 7}, 7, 1),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8, 2),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 6, 2),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 4, 2),
        ({"fast_dev_run": True}, 1, 1),
        ({"max_epochs": 2, "overfit_batches": 2}, 4, 2),
    ],
)
def test_how_long_it_trains(arguments, steps, epochs, tmp_path):
    result = fit(Net(), tmp_path, **arguments)
    assert (result.num_steps, result.num_epochs) == (steps, epochs)


class Stopping(Net):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.should_stop = True


def test_should_stop_waits_for_the_minimum(tmp_path):
    assert fit(Stopping(), tmp_path, max_epochs=5).num_steps == 1
    assert fit(Stopping(), tmp_path, max_epochs=5, min_steps=8).num_steps == 8
    assert fit(Stopping(), tmp_path, max_epochs=5, min_epochs=2).num_steps == 12


class NotFinite(Net):
    def training_step(self, batch):
        factor = float("nan") if 6.0 in batch[0] else 1.0
        return super().training_step(batch) * factor


def test_a_loss_that_is_not_finite_is_named(tmp_path, capsys):
    fit(NotFinite(), tmp_path, max_epochs=1)
    printed = capsys.readouterr().out
    assert "not finite at step 4 (epoch 0, batch 3, rank 0, samples [6, 7])" in printed


def test_detect_anomaly_stops_at_it(tmp_path):
    with pytest.raises(pl.WorkerFailed, match=r"nan|not finite"):
        fit(NotFinite(), tmp_path, max_epochs=1, detect_anomaly=True)


class Clipped(Net):
    seen: float = 0.0

    def on_before_zero_grad(self, optimizer):
        if self.weight.grad is not None:
            self.seen = max(self.seen, float(self.weight.grad.norm()))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(algorithm, tmp_path):
    module = Clipped()
    fit(module, tmp_path, max_epochs=1, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    assert module.seen == pytest.approx(0.5)


def test_simple_profiler_names_its_sections(tmp_path, capsys):
    fit(Net(), tmp_path, max_epochs=1, profiler="simple")
    printed = capsys.readouterr().out
    for section in ("data", "training_step", "backward", "optimizer_step"):
        assert section in printed


class LBFGS(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    def training_step(self, batch):
        return (self.weight**2 * batch[0]).mean()


def test_an_optimizer_with_a_closure_evaluates_it(tmp_path):
    module = LBFGS()
    result = fit(module, tmp_path, max_epochs=1)
    assert result.num_steps == 6
    assert module.weight.item() < 1.0


def test_the_last_checkpoint_is_tried_again(tmp_path, monkeypatch):
    failures = [OSError("the storage was away")]
    write_file = snapshot_module._Snapshot.write_file

    def write(snapshot, *arguments):
        if snapshot.step == 6 and failures:
            raise failures.pop()
        return write_file(snapshot, *arguments)

    monkeypatch.setattr(snapshot_module._Snapshot, "write_file", write)
    assert fit(Net(), tmp_path, max_epochs=1).last_checkpoint.step == 6


class Requesting(pl.Callback):
    """Asks for a checkpoint after steps 2 and 3, and lets the first be written after step 4."""

    def __init__(self, opened: threading.Event):
        self.opened = opened

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step in (2, 3):
            trainer.request_checkpoint()
        if trainer.global_step == 4:
            self.opened.set()
            for thread in [thread for thread in threading.enumerate() if thread.name == "snapshot"]:
                thread.join()


def test_a_checkpoint_that_was_asked_for_waits_for_the_one_in_flight(tmp_path, monkeypatch):
    opened = threading.Event()
    write_file = snapshot_module._Snapshot.write_file

    def write(snapshot, *arguments):
        assert opened.wait(30)
        return write_file(snapshot, *arguments)

    monkeypatch.setattr(snapshot_module._Snapshot, "write_file", write)
    checkpoint = pl.Checkpointing(keep_last=-1)
    result = fit(Net(), tmp_path, max_epochs=1, callbacks=[Requesting(opened)], checkpoint=checkpoint)
    assert [checkpoint.step for checkpoint in result.checkpoints] == [2, 4, 6]
