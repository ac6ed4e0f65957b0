"""The trainer has Lightning's names: before a run, in it, and after it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import raylight as pl
from raylight.contract.config import Config
from raylight.user.states import RunningStage, TrainerFn, TrainerStatus
from raylight.user.trainer_names import INSTEAD, TrainerNames

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_workers": 0, "logger": False}


def lightnings_names() -> set[str]:
    """Public attributes of an instance of the real Lightning's Trainer."""
    lightning = pytest.importorskip("pytorch_lightning")
    trainer = lightning.Trainer(
        logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False, barebones=False,
        enable_model_summary=False,
    )  # fmt: skip
    return {name for name in {*dir(lightning.Trainer), *vars(trainer)} if not name.startswith("_")}


def test_every_public_name_of_lightnings_trainer_is_there_or_says_what_to_use():
    missing = [name for name in lightnings_names() if not hasattr(pl.Trainer, name) and name not in INSTEAD]
    assert not missing
    there = [name for name in INSTEAD if hasattr(pl.Trainer, name)]
    assert not there, "these exist, and need no sentence"


def test_a_name_that_is_not_there_says_what_to_use():
    with pytest.raises(AttributeError, match="configure_model"):
        _ = TrainerNames(Config()).init_module
    with pytest.raises(AttributeError, match="did you mean 'global_step'"):
        _ = TrainerNames(Config()).global_stepp


class Net(pl.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 1)
        self.seen: dict[str, Any] = {}

    def training_step(self, batch, batch_idx):
        loss = self.l(batch).pow(2).mean()
        self.log("loss", loss)
        if batch_idx == 1 and self.current_epoch == 1:
            trainer = self.trainer
            self.seen = {
                "is": trainer,
                "state": trainer.state,
                "batch": trainer.fit_loop.epoch_loop.batch_progress.current,
                "batch_idx": trainer.fit_loop.batch_idx,
                "total_batch_idx": trainer.fit_loop.total_batch_idx,
                "epoch": trainer.fit_loop.epoch_progress.current,
                "last": trainer.is_last_batch,
            }
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.l(batch).mean())

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 3 * self.trainer.max_epochs
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader() -> DataLoader:
    return DataLoader(torch.arange(24.0).view(6, 4) / 10, batch_size=2)


class Own(pl.Trainer):
    """A trainer of the user's own."""

    greeting = "hello"


def test_hooks_get_the_callers_own_trainer(tmp_path):
    trainer, net = Own(max_epochs=2, storage_path=tmp_path, **QUIET), Net()
    trainer.fit(net, loader(), loader())
    seen = net.seen
    assert seen["is"] is trainer
    assert (seen["state"].fn, seen["state"].stage) == (TrainerFn.FITTING, RunningStage.TRAINING)
    assert seen["state"].status is TrainerStatus.RUNNING
    # as Lightning's, in the second batch of the second epoch of three batches
    assert (seen["batch"].ready, seen["batch"].completed) == (2, 1)
    assert (seen["batch_idx"], seen["total_batch_idx"]) == (1, 4)
    assert (seen["epoch"].ready, seen["epoch"].completed) == (2, 1)
    assert seen["last"] is False


def test_before_a_run_the_names_have_lightnings_values():
    trainer = pl.Trainer(max_epochs=3, **QUIET)
    assert trainer.state.status is TrainerStatus.INITIALIZING
    assert (trainer.state.fn, trainer.state.stage, trainer.state.finished) == (None, None, False)
    assert trainer.num_training_batches == float("inf")
    assert trainer.num_val_batches == trainer.num_sanity_val_batches == trainer.optimizers == []
    assert trainer.train_dataloader is trainer.val_dataloaders is trainer.lightning_module is None
    assert (trainer.current_epoch, trainer.global_step, trainer.max_epochs, trainer.world_size) == (0, 0, 3, 1)
    assert not trainer.training
    assert not trainer.sanity_checking
    assert not trainer.enable_validation
    assert trainer.callback_metrics == {}


def test_after_a_run_in_this_process_they_are_the_live_objects(tmp_path):
    trainer, net, data = pl.Trainer(max_epochs=2, storage_path=tmp_path, **QUIET), Net(), loader()
    trainer.fit(net, data, data)
    assert trainer.state.finished
    assert trainer.state.stage is None
    assert trainer.train_dataloader is data
    assert trainer.val_dataloaders is data
    assert trainer.optimizers[0].param_groups[0]["params"][0] is net.l.weight
    assert (trainer.num_training_batches, trainer.num_val_batches, trainer.num_sanity_val_batches) == (3, [3], [2])
    assert (trainer.global_step, trainer.current_epoch, trainer.fit_loop.batch_idx) == (6, 2, -1)
    assert set(trainer.callback_metrics) == {"loss", "val"}
    assert trainer.enable_validation


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_on_workers_the_trainer_is_of_the_same_class_with_the_same_names(tmp_path):
    class Telling(Net):
        def on_train_end(self):
            trainer = self.trainer
            kind = [base.__name__ for base in type(trainer).__mro__]
            world_size = trainer.strategy.world_size
            self.told = (kind, isinstance(trainer, pl.Trainer), trainer.own, trainer.greeting, world_size)
            trainer.left_by_worker = trainer.global_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer, net, data = Own(max_epochs=2, storage_path=tmp_path, **{**QUIET, "num_workers": 2}), Telling(), loader()
    trainer.own = {"a": 1}
    trainer.fit(net, data, data)
    kind, is_trainer, own, greeting, world_size = net.told
    assert kind[:2] == ["Own", "Trainer"]
    assert (is_trainer, own, greeting, world_size) == (True, {"a": 1}, "hello", 2)
    assert trainer.left_by_worker == trainer.global_step == 4
    assert trainer.state.finished
    assert trainer.world_size == 2
    assert trainer.train_dataloader is data
    assert (trainer.num_training_batches, trainer.num_val_batches) == (2, [3])
    for name in ("optimizers", "lr_scheduler_configs"):
        with pytest.raises(AttributeError, match=f"trainer.{name} stayed in the workers"):
            getattr(trainer, name)


def test_log_dir_and_loggers_are_there_before_a_fit_which_then_uses_them(tmp_path):
    trainer = pl.Trainer(max_epochs=1, storage_path=tmp_path, **{**QUIET, "logger": True})
    before, logger = trainer.log_dir, trainer.logger
    assert logger is not None
    result = trainer.fit(Net(), loader(), loader())
    assert result.path == before == trainer.log_dir
    assert trainer.logger is logger


def test_arguments_cannot_be_changed_through_the_trainer():
    trainer = pl.Trainer(**QUIET)
    with pytest.raises(AttributeError, match="max_epochs is an argument"):
        trainer.max_epochs = 3
    with pytest.raises(AttributeError, match=r"global_step can be read"):
        trainer.global_step = 3


def test_every_name_is_documented():
    names = [name for name in dir(TrainerNames) if not name.startswith("_")]
    silent = [name for name in names if not inspect.getdoc(inspect.getattr_static(TrainerNames, name))]
    assert not silent
