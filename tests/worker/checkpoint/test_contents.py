"""A checkpoint's contents: what is gathered from a rank comes back into another one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import raylight as pl
from raylight.contract.config import Checkpointing
from raylight.contract.errors import CheckpointMismatch, InvalidArguments
from raylight.contract.layout import MANIFEST_FILE
from raylight.contract.seeding import rng_state
from raylight.contract.task import Place, Rejoin
from raylight.storage.filesystem import Storage
from raylight.worker import task_runner
from raylight.worker.checkpoint import contents
from raylight.worker.checkpoint.state import State
from raylight.worker.group.control import Control
from raylight.worker.session import Session
from raylight.worker.worker import Worker
from tests.worker.nets import Line, make_loader
from tests.worker.ranks import make_task, run_task


class Net(Line):
    """Breaks in the batch after `num_batches`, so that its rank stands there; has something of each kind to keep."""

    def __init__(self, num_batches: int = 3, width: int = 5):
        super().__init__()
        self.save_hyperparameters({"width": width})
        self.num_batches, self.noted = num_batches, {}

    def training_step(self, batch, batch_idx):
        if self.trainer.num_batches_seen == self.num_batches:
            raise KeyError("broken")
        return super().training_step(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = "kept"

    def on_load_checkpoint(self, checkpoint):
        self.noted = dict(checkpoint)


class Counter(pl.Callback):
    """Has a state if its value is not 0."""

    def __init__(self, value: int = 0):
        self.value = value

    def state_dict(self):
        return {"value": self.value} if self.value else {}

    def load_state_dict(self, state):
        self.value = state["value"]


class Other(Counter):
    pass


class Data(pl.DataModule):
    def __init__(self, value: int = 0):
        super().__init__()
        self.value = value

    def train_dataloader(self):
        return make_loader(8)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def make(value: int = 0, num_batches: int = 3, **arguments: Any) -> Any:
    """A task with objects whose states are `value`."""
    options = {"callbacks": [Counter(value), Other()], "max_epochs": 3, "loaders": {"data_module": Data(value)}}
    return make_task(Net(num_batches), **{**options, **arguments})


def train(**arguments: Any) -> Worker:
    """A rank that stands after three batches."""
    control = Control()
    run_task(make(7, **arguments), control=control)
    return control.kept.worker


def begin(task: Any = None, place: Place | None = None) -> Worker:
    """A rank that has trained nothing."""
    session = Session(task or make(), place or Place(), Control())
    list(task_runner.prepare(session))
    return session.worker


def restore(worker: Worker, state: State) -> Any:
    contents.restore_weights(worker, state)
    worker.open_training_data()
    return contents.restore_training(worker, state)


def test_all_that_was_gathered_comes_back():
    trained, fresh = train(), begin()
    state = copy.deepcopy(contents.collect(trained))
    random_numbers = rng_state()
    restored = restore(fresh, state)
    assert fresh.module.weight.item() == trained.module.weight.item() != 0.0
    assert [p is q for p, q in zip(contents.collect(trained).parameters, trained.module.parameters(), strict=True)]
    (optimizer,), (config,) = fresh.optimizers.all, fresh.optimizers.schedulers
    assert optimizer.state_dict() == trained.optimizers.all[0].state_dict()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
    assert config.scheduler.last_epoch == 3
    assert [callback.value for callback in fresh.hooks.callbacks] == [7, 0]  # one had nothing to keep
    assert fresh.data_module.value == 7
    assert fresh.progress == trained.progress
    assert (fresh.progress.global_step, fresh.progress.batch_idx, fresh.progress.position) == (3, 3, 6)
    assert torch.equal(restored["torch"], random_numbers["torch"])
    assert fresh.metrics.carried == trained.metrics.epoch_share() != {}
    assert fresh.metrics.epoch_values == trained.metrics.epoch_values
    position = fresh.data.batches.iterate(0, fresh.progress.position)
    assert next(iter(position)).data[0].tolist() == [[6.0], [7.0]]


def test_hooks_see_the_state_as_lightnings_files_have_it():
    fresh = begin()
    restore(fresh, contents.collect(train()))
    noted = fresh.module.noted
    assert (noted["mine"], noted["epoch"], noted["global_step"]) == ("kept", 0, 3)
    assert noted["hyper_parameters"] == {"width": 5}
    assert set(noted["state_dict"]) == {"weight"}


def test_a_users_extras_are_all_that_is_not_lightnings():
    state = contents.collect(train())
    assert state.module["extra"] == {"mine": "kept"}


def test_between_epochs_no_values_are_carried_and_the_next_epoch_begins():
    trained, fresh = train(num_batches=4), begin()
    restore(fresh, copy.deepcopy(contents.collect(trained)))
    assert (fresh.progress.current_epoch, fresh.progress.batch_idx, fresh.progress.position) == (1, 0, 0)
    assert fresh.metrics.carried == {}
    assert fresh.metrics.epoch_values["loss_epoch"] == 3.5
    assert fresh.metrics.newest()["loss_epoch"] == 3.5


def test_what_several_ranks_had_logged_falls_to_those_that_there_are():
    state = copy.deepcopy(contents.collect(train()))
    state.others, state.own = [dict(state.own) for _ in range(3)], {}
    flags, ((total, weight),) = train().metrics.epoch_share()["loss"]
    for rank, times in ((0, 2), (1, 1)):
        fresh = begin(make(task={"mode": Rejoin()}), Place(rank=rank, world_size=2))
        assert restore(fresh, state) is None  # no stream of random numbers would be the right one
        assert fresh.metrics.carried["loss"] == (flags, [(total * times, weight * times)])


@pytest.mark.parametrize(("attempt", "is_there", "saved_at"), [(0, False, -1), (0, True, 3), (1, False, 3)])
def test_a_state_that_is_on_storage_counts_as_saved(tmp_path, attempt, is_there, saved_at):
    state = contents.collect(train())
    files = Storage(str(tmp_path))
    if is_there:
        files.write(f"checkpoints/step-00000003/{MANIFEST_FILE}", [b"{}"])
    options = {"files": files, "checkpoint": Checkpointing(), "task": {"attempt": attempt}}
    fresh = begin(make(**options))
    restore(fresh, state)
    assert fresh.saving.saved_at == saved_at
    assert not fresh.saving.is_requested


def test_where_nothing_is_written_nothing_is_committed():
    assert contents.is_committed(train()) is False


def test_a_checkpoint_is_named_by_its_step_and_without_one_by_its_batch_too():
    assert contents.directory_of(train()) == "checkpoints/step-00000003"
    names = {contents.directory_of(train(num_batches=n, accumulate_grad_batches=2)) for n in (2, 3)}
    assert names == {"checkpoints/step-00000001"}  # a batch that was accumulated is taken back
    by_hand = train()
    by_hand.progress.finish_window(3)
    assert contents.directory_of(by_hand).startswith("checkpoints/step-00000003-")
    assert contents.directory_of(train(task={"attempt": 2})) != "checkpoints/step-00000003"


def test_weights_alone_are_no_state_to_go_on_from():
    state = contents.collect(train())
    state.replicated = {}
    with pytest.raises(CheckpointMismatch, match="weights only"):
        restore(begin(), state)


def test_another_number_of_optimizers_is_refused_with_both_numbers():
    state = contents.collect(train())
    state.replicated["optimizers"] = state.replicated["optimizers"] * 2
    with pytest.raises(CheckpointMismatch, match=r"has 2 optimizers, configure_optimizers returned 1"):
        restore(begin(), state)


def test_a_state_without_that_of_a_data_module_leaves_it_as_it_is():
    state = contents.collect(train())
    state.replicated["data_module"] = {}
    fresh = begin(make(3))
    restore(fresh, state)
    assert fresh.data_module.value == 3


def test_a_hook_that_saves_is_outside_of_the_epoch_and_logs_nothing():
    class Logging(Counter):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            module.log("late", 1.0)

    trained = train(callbacks=[Logging()])
    trained.hooks.attach()
    before = trained.metrics.epoch_share()
    with pytest.raises(InvalidArguments, match="on_save_checkpoint is outside"):
        contents.collect(trained)
    assert trained.metrics.epoch_share() == before


@pytest.mark.parametrize(("strict", "fits"), [(True, False), (False, True)])
def test_weights_that_are_missing_are_an_error_unless_the_module_allows_it(strict, fits):
    state = contents.collect(train())
    state.model = {}
    fresh = begin()
    fresh.module.strict_loading = strict
    if fits:
        contents.restore_weights(fresh, state)
    else:
        with pytest.raises(CheckpointMismatch):
            contents.restore_weights(fresh, state)


def test_new_options_count_if_they_are_asked_for():
    state = copy.deepcopy(contents.collect(train()))
    before = {"optimizers": [[{"lr": 0.1, "momentum": 0.25}]], "schedulers": []}
    state.replicated["configured"] = before
    for takes, momentum in ((False, 0.5), (True, 0.75)):
        fresh = begin(make(task={"takes_new_options": takes}))
        fresh.optimizers.configure({**before, "optimizers": [[{"lr": 0.1, "momentum": 0.75}]]})
        restore(fresh, state)
        assert fresh.optimizers.all[0].param_groups[0]["momentum"] == momentum
