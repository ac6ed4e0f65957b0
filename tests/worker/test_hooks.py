"""The user's hooks by name: whose they are, in which order, and with which arguments."""

from __future__ import annotations

from typing import Any

import pytest

import raylight as pl
from raylight.contract.errors import DataError
from raylight.worker.hooks import Hooks, bind_step, takes_outputs


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.called: list[Any] = []

    def on_train_start(self):
        self.called.append("module")

    def on_train_epoch_end(self):
        self.called.append("module")


class Noting(pl.Callback):
    def on_train_start(self, trainer, module):
        module.called.append(self)

    def on_train_epoch_end(self, trainer, module):
        module.called.append((trainer, self))


class Judging(Noting):
    _judges_values = True


class Silent(pl.Callback):
    pass


class Data(pl.DataModule):
    def prepare_data(self): ...


def make_hooks(*callbacks: pl.Callback, data_module: pl.DataModule | None = None) -> Hooks:
    return Hooks("the trainer", Net(), data_module, callbacks)  # type: ignore[arg-type]


def test_callbacks_come_before_the_module_and_what_nobody_wrote_is_not_called():
    first, second = Noting(), Judging()
    hooks = make_hooks(first, Silent(), second)
    hooks.call("on_train_start")
    assert hooks.module.called == [first, second, "module"]
    assert hooks.of("on_train_end") == ()
    assert hooks.of("on_train_start") is hooks.of("on_train_start")
    assert hooks.overrides("on_train_start")
    assert not hooks.overrides("on_train_end")
    assert hooks.of_module("on_train_end") == ()


def test_callbacks_that_judge_values_come_in_a_second_turn():
    judging, noting = Judging(), Noting()
    hooks = make_hooks(judging, noting)
    turns = hooks.at_epoch_end()
    for turn in turns:
        for hook in turn:
            hook()
    assert [len(turn) for turn in turns] == [2, 1]
    assert hooks.module.called == [("the trainer", noting), "module", ("the trainer", judging)]
    assert len(make_hooks(noting).at_epoch_end()) == 1


def test_a_callback_of_configure_callbacks_replaces_one_of_its_type():
    old, other, new = Noting(), Silent(), Noting()
    hooks = make_hooks(old, other)
    before = hooks.of("on_train_start")
    hooks.add_callbacks([new])
    assert hooks.callbacks == [other, new]
    assert hooks.of("on_train_start") is not before
    hooks.call("on_train_start")
    assert hooks.module.called == [new, "module"]


def test_another_module_takes_the_place_with_its_hooks():
    hooks, other = make_hooks(), Net()
    hooks.call("on_train_start")
    hooks.replace_module(other)
    hooks.call("on_train_start")
    assert other.called == ["module"]


def test_module_and_data_module_know_the_trainer_while_the_run_lasts():
    data_module = Data()
    hooks = make_hooks(data_module=data_module)
    hooks.attach()
    assert hooks.module.trainer == data_module.trainer == "the trainer"
    hooks.detach()
    with pytest.raises(RuntimeError):
        _ = hooks.module.trainer
    assert data_module.trainer == "the trainer"
    make_hooks().attach()


def test_the_data_modules_hook_counts_before_the_modules():
    data_module = Data()
    hooks = make_hooks(data_module=data_module)
    assert hooks.owner_of("prepare_data") is data_module
    assert hooks.owner_of("on_train_start") is hooks.module
    assert hooks.owner_of("on_train_end") is None
    assert make_hooks().owner_of("prepare_data") is None


@pytest.mark.parametrize(
    ("function", "several", "expected"),
    [
        (lambda batch: (batch,), False, ("b",)),
        (lambda batch, batch_idx: (batch, batch_idx), False, ("b", 1)),
        (lambda batch, dataloader_idx: (batch, dataloader_idx), False, ("b", 2)),
        (lambda batch, batch_idx, dataloader_idx: (batch, batch_idx, dataloader_idx), False, ("b", 1, 2)),
        (lambda batch, batch_idx, dataloader_idx=0: (batch, batch_idx, dataloader_idx), False, ("b", 1, 2)),
        (lambda *arguments: arguments, False, ("b", 1)),
        (lambda *arguments: arguments, True, ("b", 1, 2)),
        (lambda batch, *others: (batch, *others), False, ("b", 1)),
        (lambda batch, *, flag=3: (batch, flag), False, ("b", 3)),
    ],
)
def test_a_step_gets_what_it_takes(function, several, expected):
    assert bind_step(function, several)("b", 1, 2) == expected


def test_a_step_is_taken_to_have_one_loader():
    assert bind_step(lambda *arguments: arguments)("b", 1, 2) == ("b", 1)


def test_a_step_that_takes_no_batch_is_an_error():
    with pytest.raises(DataError, match="takes no batch; its signature is"):
        bind_step(lambda: None)


def test_an_epoch_end_hook_may_take_outputs():
    assert takes_outputs(lambda outputs: None)
    assert not takes_outputs(lambda: None)
