"""Patterns that projects written for Lightning have, each with the outcome that it has there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import raylight as pl

WORKERS = [0, pytest.param(2, marks=pytest.mark.ray)]
pytestmark = pytest.mark.usefixtures("ray_if_marked")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "use_gpu": False, "seed": 1}


def numbers(count: int = 8, batch_size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(float(count)).unsqueeze(1)), batch_size=batch_size)


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch):
        return (self.weight * batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, path, *loaders, **arguments) -> pl.Result:
    return pl.fit(
        module, *(loaders or (numbers(),)), **{"max_epochs": 1, "storage_path": str(path), **QUIET, **arguments}
    )


class Measuring(Net):
    """Logs the object in the step, and reads it once more where the epoch ends."""

    def __init__(self):
        super().__init__()
        self.seen, self.trained = MeanMetric(), MeanMetric()
        self.best: list[float] = []

    def training_step(self, batch):
        self.trained.update(batch[0])
        self.log("trained", self.trained, on_step=False, on_epoch=True)
        return super().training_step(batch)

    def on_train_epoch_end(self):
        self.log("trained_again", self.trained)

    def validation_step(self, batch):
        self.seen.update(batch[0])
        self.log("seen", self.seen)
        self.log("seen_too", self.seen)

    def on_validation_epoch_end(self):
        self.best.append(float(self.seen.compute()))
        self.log("best", max(self.best))


@pytest.mark.parametrize("num_workers", WORKERS)
def test_torchmetrics_are_reset_after_the_hooks_of_the_epochs_end(tmp_path, num_workers):
    module = Measuring()
    result = fit(module, tmp_path, numbers(), numbers(), num_workers=num_workers, max_epochs=2)
    names = ("trained", "trained_again", "seen", "seen_too", "best")
    assert {name: result.metrics[name] for name in names} == dict.fromkeys(names, 3.5)


class ManualNet(Net):
    automatic_optimization = False

    def __init__(self, scheduler=None, steps_itself=True):
        super().__init__()
        self.scheduler, self.steps_itself = scheduler, steps_itself
        self.rates: list[float] = []

    def training_step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        optimizer.step()
        if self.steps_itself:
            self.lr_schedulers().step()
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}


def test_manual_optimization_steps_its_schedulers_alone(tmp_path):
    module = ManualNet(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    fit(module, tmp_path, checkpoint=False)
    assert module.rates == [0.05, 0.025, 0.0125, 0.00625]


def test_manual_optimization_may_watch_a_plateau_by_itself(tmp_path):
    module = ManualNet(torch.optim.lr_scheduler.ReduceLROnPlateau, steps_itself=False)
    assert fit(module, tmp_path, checkpoint=False).num_steps == 4


def test_manual_optimization_clips_and_accumulates_by_itself(tmp_path):
    module = ManualNet(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1))
    with pytest.raises(pl.InvalidArguments) as caught:
        fit(module, tmp_path, gradient_clip_val=1.0, accumulate_grad_batches=2)
    assert len(caught.value.mistakes) == 2
    assert "self.clip_gradients" in str(caught.value)


class Skipping(Net):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch)


def test_a_step_without_a_loss_leaves_the_parameters(tmp_path):
    """The gradients of the batch before are not applied again."""
    module = Skipping()
    fit(module, tmp_path, checkpoint=False)
    assert module.weight.item() == pytest.approx(1 - 0.1 * (0.5 + 4.5))


class Overall(Net):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", batch[0].mean())

    def on_validation_epoch_end(self):
        self.log("val_loss", 100.0)

    def training_step(self, batch):
        loss = super().training_step(batch)
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self):
        self.log("loss", 200.0)


def test_the_same_name_in_a_step_and_at_the_epochs_end(tmp_path):
    metrics = fit(Overall(), tmp_path, numbers(), [numbers(), numbers(4)]).metrics
    assert metrics["val_loss/dataloader_idx_0"] == 3.5
    assert metrics["val_loss/dataloader_idx_1"] == 1.5
    assert metrics["val_loss"] == 100.0
    assert metrics["loss"] == 200.0


class EndingWell(Net):
    def on_train_epoch_end(self):
        self.log("ended", float(self.current_epoch))


def test_early_stopping_watches_what_the_module_logs_at_the_epochs_end(tmp_path):
    stopping = pl.callbacks.EarlyStopping("ended", patience=2)
    result = fit(EndingWell(), tmp_path, max_epochs=9, callbacks=[stopping], checkpoint=False)
    assert result.num_epochs == 3


class Gathering(Net):
    def training_step(self, batch):
        self.shape = tuple(self.all_gather(batch[0]).shape)
        return super().training_step(batch)


def test_all_gather_of_one_worker_adds_no_dimension(tmp_path):
    module = Gathering()
    fit(module, tmp_path, checkpoint=False)
    assert module.shape == (2, 1)


class ThreeOptimizers(Net):
    automatic_optimization = False

    def training_step(self, batch):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            optimizer.step()
        self.log("loss", batch[0].mean())

    def configure_optimizers(self):
        return [super(ThreeOptimizers, self).configure_optimizers() for _ in range(3)]


def test_several_steps_a_batch_are_logged_as_often(tmp_path):
    monitor = pl.callbacks.LearningRateMonitor("step")
    result = fit(ThreeOptimizers(), tmp_path, numbers(40), callbacks=[monitor], log_every_n_steps=10, checkpoint=False)
    assert result.num_steps == 60
    history = result.history().to_pylist()
    for name in ("loss", "lr-SGD"):
        assert len({row["step"] for row in history if row["name"] == name}) == 6


class Describing(Net):
    def on_fit_start(self):
        self.logger.log_hyperparams({"width": 3}, {"hp_metric": 0.5})


def test_hyperparameters_with_their_metrics(tmp_path):
    result = fit(Describing(), tmp_path, checkpoint=False)
    assert result.metrics["hp_metric"] == 0.5
    assert pl.open_run(str(tmp_path)).hyperparameters["width"] == 3


class Asking(Net):
    def training_step(self, batch, batch_idx):
        trainer = self.trainer
        self.answers = {
            "last": trainer.is_last_batch,
            "every": trainer.log_every_n_steps,
            "fast": trainer.fast_dev_run,
            "precision": trainer.precision,
            "stopping": trainer.early_stopping_callback,
            "checkpointing": trainer.checkpoint_callback,
            "reduced": trainer.strategy.reduce(torch.tensor(2.0)).item(),
            "zero": trainer.strategy.is_global_zero,
        }
        trainer.strategy.barrier()
        return super().training_step(batch)


def test_what_modules_ask_their_trainer(tmp_path):
    module, stopping = Asking(), pl.callbacks.EarlyStopping("loss", strict=False)
    fit(module, tmp_path, callbacks=[stopping], log_every_n_steps=7, checkpoint=False)
    assert isinstance(module.answers.pop("stopping"), pl.callbacks.EarlyStopping)
    assert module.answers == {
        "last": True, "every": 7, "fast": False, "precision": "32-true", "checkpointing": None, "reduced": 2.0,
        "zero": True,
    }  # fmt: skip


class Mistaken(Net):
    def training_step(self, batch):
        return self.trainer.num_traning_batches


def test_an_attribute_that_the_trainer_does_not_have(tmp_path):
    with pytest.raises(pl.WorkerFailed, match="did you mean 'num_training_batches'"):
        fit(Mistaken(), tmp_path, checkpoint=False)


class Broken(Net):
    def train_dataloader(self):
        return self.no_such_data

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_an_attribute_error_of_the_users_own_is_told_as_it_is(tmp_path):
    """Not as that of the trainer's attribute which led to it."""
    with pytest.raises(pl.WorkerFailed, match="no attribute 'no_such_data'"):
        pl.fit(Broken(), num_workers=0, storage_path=str(tmp_path), checkpoint=False, **QUIET)
