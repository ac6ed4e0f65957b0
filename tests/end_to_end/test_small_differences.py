"""Scripts that Lightning runs, or refuses, as it does: where a number comes out, both are asked."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.callbacks import EarlyStopping, LambdaCallback, LearningRateMonitor
from raylight.contract.errors import InvalidArguments

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = pytest.mark.parametrize("lib", [pytorch_lightning, pl], ids=["lightning", "raylight"])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_loader(length: int = 8, batch_size: int = 2) -> DataLoader[Any]:
    samples = torch.arange(float(length * 2)).view(length, 2) / length
    return DataLoader(TensorDataset(samples), batch_size=batch_size)


def make_trainer(lib: ModuleType = pl, **changes: Any) -> Any:
    options = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return lib.Trainer(**(options | changes))


def make_net(lib: ModuleType = pl, **members: Any) -> Any:
    """A small module with `members` in place of its own."""

    class Net(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.layer = nn.Linear(2, 1)
            self.seen: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(batch_idx)
            return self.layer(batch[0]).pow(2).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append("v")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    return type("Net", (Net,), members)()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    return shown.out + shown.err


# ---- steps and loaders that are not there


def test_a_validation_loader_without_a_step_is_told_and_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    net = make_net(validation_step=None)
    make_trainer().fit(net, make_loader(), make_loader())
    assert net.seen == [0, 1, 2, 3] * 2
    assert said(capsys).count("there is a validation loader, and Net has no validation_step") == 1


def test_a_validation_step_without_a_loader_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer().fit(make_net(), make_loader())
    assert said(capsys).count("Net has a validation_step, and there is no validation loader") == 1
    make_trainer(limit_val_batches=0).fit(make_net(), make_loader())
    assert "validation_step" not in said(capsys)


@BOTH
def test_without_an_optimizer_the_steps_are_counted_and_nothing_is_trained(lib: ModuleType) -> None:
    net = make_net(lib, configure_optimizers=lambda self: None)
    before = net.layer.weight.clone()
    trainer = make_trainer(lib)
    trainer.fit(net, make_loader())
    assert torch.equal(before, net.layer.weight)
    assert (trainer.global_step, trainer.current_epoch, len(net.seen)) == (8, 2, 8)
    assert repr(trainer.optimizers) == "[No Optimizer]"


def test_a_run_without_an_optimizer_is_saved_and_goes_on() -> None:
    net = make_net(configure_optimizers=lambda self: None)
    pl.Trainer(max_epochs=1, num_workers=0, logger=False, enable_progress_bar=False).fit(net, make_loader())
    trainer = pl.Trainer(max_epochs=3, num_workers=0, logger=False, enable_progress_bar=False)
    trainer.fit(net, make_loader(), ckpt_path="last")
    assert (trainer.global_step, len(net.seen)) == (12, 12)


def skip_some(self: Any, batch: Any, batch_idx: int) -> Any:
    return None if batch_idx in (1, 2) else self.layer(batch[0]).pow(2).mean()


@BOTH
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_returns_none_skips_its_batch(lib: ModuleType, accumulate: int) -> None:
    def keep(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs)

    net = make_net(lib, training_step=skip_some, on_train_batch_end=keep)
    trainer = make_trainer(lib, accumulate_grad_batches=accumulate)
    trainer.fit(net, make_loader(16))
    assert [outputs == {} for outputs in net.seen[:4]] == [False, True, True, False]
    assert trainer.global_step == 16 // accumulate
    expected = make_net(pytorch_lightning, training_step=skip_some)
    make_trainer(pytorch_lightning, accumulate_grad_batches=accumulate).fit(expected, make_loader(16))
    assert torch.allclose(net.layer.weight, expected.layer.weight, atol=1e-6)


def test_a_step_that_returns_none_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer().fit(make_net(training_step=skip_some), make_loader())
    assert said(capsys).count("training_step returned None: such a batch is skipped") == 1


# ---- signatures


@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_a_step_that_cannot_tell_two_loaders_apart_is_refused_before_the_first_batch(num_sanity_val_steps: int) -> None:
    net = make_net()
    with pytest.raises(InvalidArguments, match=r"Net\.validation_step has no argument dataloader_idx") as caught:
        make_trainer(num_sanity_val_steps=num_sanity_val_steps).fit(net, make_loader(), [make_loader(), make_loader()])
    assert "write (self, batch, batch_idx, dataloader_idx=0)" in str(caught.value)
    assert net.seen == []


def test_any_step_that_takes_the_index_will_do() -> None:
    taking = [
        lambda self, batch, batch_idx, dataloader_idx: None, lambda self, batch, dataloader_idx=0: None,
        lambda self, *arguments: None, lambda self, batch, batch_idx, which: None,
    ]  # fmt: skip
    for step in taking:
        make_trainer().validate(make_net(validation_step=step), [make_loader(), make_loader()])


def test_predictions_of_none_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    net = make_net(predict_step=lambda self, batch, batch_idx: None)
    assert make_trainer().predict(net, make_loader()) == [None] * 4
    assert said(capsys).count("predict_step returned None") == 1
    make_trainer().predict(net, make_loader(), return_predictions=False)
    assert "returned None" not in said(capsys)


# ---- arguments


@BOTH
def test_an_interval_above_the_limit_is_no_matter_where_validation_is_off(lib: ModuleType) -> None:
    trainer = make_trainer(lib, val_check_interval=4, limit_train_batches=2, limit_val_batches=0.0)
    trainer.fit(make_net(lib), make_loader(), make_loader())
    assert trainer.global_step == 4


@BOTH
@pytest.mark.parametrize(("reduction", "expected"), [("SUM", 6), ("Max", 3), (torch.max, 3), (torch.min, 0), (sum, 6)])
def test_a_reduction_in_any_spelling(lib: ModuleType, reduction: Any, expected: float) -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("value", float(batch_idx), reduce_fx=reduction, batch_size=1)

    if lib is pytorch_lightning and reduction is sum:
        reduction = torch.sum  # which is what Lightning has of it
    trainer = make_trainer(lib)
    trainer.validate(make_net(lib, validation_step=step), make_loader(), verbose=False)
    assert trainer.callback_metrics["value"] == expected


@BOTH
def test_barebones_trains_and_drops_what_is_logged(lib: ModuleType) -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log_dict({"loss": 1.0}, prog_bar=True)
        return self.layer(batch[0]).pow(2).mean()

    trainer = lib.Trainer(barebones=True, max_epochs=1, accelerator="cpu", devices=1)
    net = make_net(lib, training_step=step)
    trainer.fit(net, make_loader(), make_loader())
    assert (trainer.barebones, trainer.global_step, net.seen) == (True, 4, ["v"] * 4)
    assert (trainer.callback_metrics, trainer.loggers, trainer.callbacks) == ({}, [], [])


def test_barebones_says_once_that_nothing_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = pl.Trainer(barebones=True, max_epochs=2, num_workers=0)
    trainer.fit(make_net(on_train_batch_start=lambda self, *_: self.log("loss", 1.0)), make_loader())
    assert said(capsys).count("barebones=True: what is logged is dropped") == 1


# ---- callbacks


def test_a_lambda_callback_takes_every_hook_that_a_callback_has() -> None:
    public = {name for name in dir(pl.Callback) if not name.startswith("_")}
    hooks = {name for name in public if inspect.isfunction(getattr(pl.Callback, name))}
    assert public - hooks == {"state_key"}
    called: set[str] = set()
    functions = {name: lambda *_, name=name: called.add(name) for name in hooks - {"state_dict", "load_state_dict"}}
    trainer = make_trainer(callbacks=[LambdaCallback(**functions)], num_sanity_val_steps=1)
    trainer.fit(make_net(), make_loader(), make_loader())
    assert {"setup", "on_sanity_check_start", "on_before_zero_grad", "on_validation_end", "teardown"} <= called


def test_no_callback_of_ours_has_public_helpers_under_the_old_names() -> None:
    kinds = [getattr(pl.callbacks, name) for name in pl.callbacks.__all__]
    assert len(kinds) > 15
    assert [kind for kind in kinds if {"find_mistakes", "judges_values", "comes_last"} & set(dir(kind))] == []


@BOTH
@pytest.mark.parametrize("has_scheduler", [True, False])
def test_early_stopping_watches_what_the_learning_rate_monitor_logs(lib: ModuleType, has_scheduler: bool) -> None:
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
        return ([optimizer], [scheduler]) if has_scheduler else optimizer

    stopping = lib.callbacks.EarlyStopping("lr-SGD", patience=2)
    callbacks = [lib.callbacks.LearningRateMonitor(), stopping]
    trainer = make_trainer(lib, max_epochs=9, logger=True, callbacks=callbacks, log_every_n_steps=1)
    trainer.fit(make_net(lib, configure_optimizers=configure), make_loader())
    assert trainer.current_epoch == (5 if has_scheduler else 3)
    assert trainer.callback_metrics["lr-SGD"] == pytest.approx(0.001 if has_scheduler else 0.1)


def test_a_value_that_a_hook_sets_is_there_for_the_callbacks_after_it() -> None:
    def measure(trainer: Any, module: Any) -> None:
        trainer.callback_metrics["mine"] = torch.tensor(float(trainer.current_epoch))

    stopping = EarlyStopping("mine", mode="min", patience=1)
    trainer = make_trainer(max_epochs=5, callbacks=[LambdaCallback(on_train_epoch_end=measure), stopping])
    trainer.fit(make_net(), make_loader())
    assert (trainer.current_epoch, stopping.best_score) == (2, 0.0)
    assert type(trainer.callback_metrics) is dict


def two_optimizers(self: Any) -> Any:
    self.other = nn.Linear(1, 1)
    groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": 0.3, "name": "bias"}]
    first = torch.optim.SGD(groups, 0.1)
    second, third = torch.optim.SGD(self.other.parameters(), 0.2), torch.optim.Adagrad([nn.Parameter(torch.ones(1))], 1)
    return [first, second, third], [torch.optim.lr_scheduler.StepLR(second, 1)]


@BOTH
def test_learning_rates_have_lightnings_names_and_values(lib: ModuleType) -> None:
    monitor = lib.callbacks.LearningRateMonitor(log_momentum=True)
    net = make_net(lib, configure_optimizers=two_optimizers, training_step=lambda self, batch, batch_idx: None)
    net.automatic_optimization = False
    make_trainer(lib, max_epochs=1, logger=True, callbacks=[monitor], log_every_n_steps=1).fit(net, make_loader(4))
    rates = {"lr-SGD": [0.2], "lr-SGD-1/pg1": [0.1] * 3, "lr-SGD-1/bias": [0.3] * 3, "lr-Adagrad": [1] * 3}
    if lib is pl:  # a step that is not made has no row
        rates = {name: values[:2] for name, values in rates.items()}
    assert monitor.lrs == rates
    assert monitor.last_momentum_values == {f"{name}-momentum": 0 for name in rates}


def test_an_optimizer_without_momentum_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    net = make_net(configure_optimizers=lambda self: torch.optim.Adagrad(self.parameters()))
    make_trainer(logger=True, callbacks=[LearningRateMonitor(log_momentum=True)]).fit(net, make_loader())
    assert said(capsys).count("Adagrad has no momentum; 0 is logged") == 1
    make_trainer(logger=True, callbacks=[LearningRateMonitor(log_momentum=True)]).fit(make_net(), make_loader())
    assert "momentum" not in said(capsys)


class Counting(pl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"count": 1}


def test_callbacks_that_a_resumed_run_lacks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"num_workers": 0, "logger": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, callbacks=[Counting()], **options).fit(make_net(), make_loader())
    pl.Trainer(max_epochs=2, callbacks=[Counting()], **options).fit(make_net(), make_loader(), ckpt_path="last")
    assert "does not have" not in said(capsys)
    pl.Trainer(max_epochs=3, **options).fit(make_net(), make_loader(), ckpt_path="last")
    assert said(capsys).count("state of callbacks that this run does not have: Counting") == 1


# ---- what a person may not expect


def test_an_epoch_shorter_than_the_interval_of_rows_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(logger=True).fit(make_net(), make_loader())
    assert said(capsys).count("an epoch has 4 optimizer steps, which is less than log_every_n_steps=50") == 1
    make_trainer(logger=True, log_every_n_steps=4).fit(make_net(), make_loader())
    make_trainer(logger=False).fit(make_net(), make_loader())
    assert "log_every_n_steps" not in said(capsys)


def test_parts_in_evaluation_mode_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    net = make_net()
    net.backbone = nn.Sequential(nn.Linear(2, 2)).eval()
    make_trainer().fit(net, make_loader())
    assert said(capsys).count("2 parts of the module are in evaluation mode") == 1


# ---- the end of a run


@BOTH
@pytest.mark.parametrize(
    ("limits", "steps"),
    [({}, 6), ({"min_epochs": 3}, 12), ({"min_steps": 7}, 7), ({"min_epochs": 2, "min_steps": 3}, 8)],
)
def test_should_stop_in_the_middle_of_an_epoch_waits_for_the_minimum(
    lib: ModuleType, limits: dict[str, int], steps: int
) -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5:
            self.trainer.should_stop = True
        return self.layer(batch[0]).pow(2).mean()

    trainer = make_trainer(lib, max_epochs=6, **limits)
    trainer.fit(make_net(lib, training_step=step), make_loader())
    assert trainer.global_step == steps


@BOTH
@pytest.mark.parametrize(
    ("interval", "expected"), [(1.0, [0, 1, 2, 3, "v", 0, 1, "v"]), (2, [0, 1, "v", 2, 3, "v", 0, 1, "v"])]
)
def test_what_should_stop_ends_is_validated(lib: ModuleType, interval: float, expected: list[Any]) -> None:
    def stop(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trainer.should_stop = self.global_step == 6

    net = make_net(lib, on_train_batch_end=stop)
    make_trainer(lib, max_epochs=6, val_check_interval=interval).fit(net, make_loader(), make_loader(2))
    assert net.seen == expected


# ---- modules and data modules


def test_a_module_can_be_scripted_and_traced_before_and_after_a_fit() -> None:
    net = make_net(forward=ScriptedForward.forward)
    sample = torch.ones(1, 2)
    for _ in range(2):
        assert torch.equal(torch.jit.trace(net, sample)(sample), net(sample))
        make_trainer().fit(net, make_loader())
    whole = ScriptedForward()
    assert torch.equal(torch.jit.script(whole)(sample), whole(sample))
    with pytest.raises(RuntimeError, match="not attached to a run"):
        whole.trainer  # noqa: B018


class ScriptedForward(pl.Module):
    def __init__(self, width: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@BOTH
def test_the_text_of_a_data_module_is_the_sizes_of_its_loaders(lib: ModuleType) -> None:
    class Data(lib.LightningDataModule):  # type: ignore[misc, name-defined]
        def train_dataloader(self) -> Any:
            return make_loader(8)

        def val_dataloader(self) -> Any:
            return [make_loader(4), make_loader(6)]

        def test_dataloader(self) -> Any:
            return self.not_there_before_setup

    assert str(Data()).splitlines() == [
        "{Train dataloader: size=8}", "{Validation dataloader: 1. size=4 ; 2. size=6}", "{Test dataloader: None}",
        "{Predict dataloader: None}",
    ]  # fmt: skip
