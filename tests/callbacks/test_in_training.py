"""Callbacks in a real training, in this process."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch

from raylight.callbacks import (
    BackboneFinetuning,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
)
from raylight.contract.errors import InvalidArguments


def logged(trainer, prefix):
    """{name: [(step, value), ...]} of the names that begin so."""
    found = {}
    for row in trainer.result.history().to_pylist():
        if row["name"].startswith(prefix):
            found.setdefault(row["name"], []).append((row["step"], row["value"]))
    return found


def test_early_stopping_ends_the_run_and_tells_the_caller(fit, make_net):
    stopping = EarlyStopping("val_loss", patience=2)
    trainer = fit(make_net(lr=0.0), stopping, max_epochs=20)
    assert trainer.result.num_epochs == 3
    assert stopping.stopped_epoch == 2
    assert stopping.wait_count == 2


def test_early_stopping_may_watch_the_training_loss(fit, make_net):
    assert fit(make_net(lr=0.0), EarlyStopping("train_loss_epoch", patience=1), max_epochs=9).result.num_epochs == 2


def test_early_stopping_after_each_validation(fit, make_net):
    trainer = fit(make_net(lr=0.0), EarlyStopping("val_loss", patience=3), max_epochs=9, val_check_interval=2)
    assert trainer.global_step == 8


def test_early_stopping_waits_for_the_least_number_of_epochs(fit, make_net):
    trainer = fit(make_net(lr=0.0), EarlyStopping("val_loss", patience=1), max_epochs=9, min_epochs=4)
    assert trainer.result.num_epochs == 4


def test_early_stopping_on_a_metric_that_nobody_logs_is_one_clear_error(fit, make_net):
    with pytest.raises(InvalidArguments, match=r"'val_los' was not logged.*Logged so far: val_loss, "):
        fit(make_net(), EarlyStopping("val_los"))


def test_early_stopping_goes_on_counting_after_a_resume(fit, make_net):
    fit(make_net(lr=0.0), EarlyStopping("val_loss", patience=4), name="run", max_epochs=3)
    stopping = EarlyStopping("val_loss", patience=4)
    trainer = fit(make_net(lr=0.0), stopping, name="run", resume="last", max_epochs=20)
    assert trainer.result.num_epochs == 5


def test_a_run_that_goes_on_has_the_arguments_that_were_given_now(fit, make_net):
    fit(make_net(lr=0.0), EarlyStopping("val_loss", patience=1, min_delta=5.0), name="run", max_epochs=3)
    stopping = EarlyStopping("val_loss", patience=6)
    trainer = fit(make_net(lr=0.0), stopping, name="run", resume="last", max_epochs=20)
    assert (stopping.patience, stopping.min_delta, trainer.result.num_epochs) == (6, 0.0, 7)
    fit(make_net(), StochasticWeightAveraging(0.1, 2, 9), name="swa", max_epochs=3)
    swa = StochasticWeightAveraging(0.02, 2, 1, "linear")
    trainer = fit(make_net(), swa, LearningRateMonitor("epoch"), name="swa", resume="last", max_epochs=6)
    assert logged(trainer, "lr-SGD")["lr-SGD"][-1] == (30, pytest.approx(0.02))


def test_a_callback_that_is_used_again_begins_from_the_start(fit, make_net):
    def make():
        return [
            EarlyStopping("val_loss", patience=2), ModelCheckpoint(monitor="val_loss", save_top_k=2),
            LearningRateMonitor("step", log_momentum=True), BackboneFinetuning(1), EMAWeightAveraging(decay=0.5),
            DeviceStatsMonitor(cpu_stats=True),
        ]  # fmt: skip

    used, fresh = make(), make()
    fit(make_net(lr=0.0), *used, max_epochs=3, name="first")
    assert used[0].stopped_epoch == 2
    again = fit(make_net(), *used, max_epochs=2, name="again")
    alone = fit(make_net(), *fresh, max_epochs=2, name="alone")
    assert again.result.num_epochs == alone.result.num_epochs == 2
    assert logged(again, "lr-SGD") == logged(alone, "lr-SGD")
    names = {name: [step for step, _ in values] for name, values in logged(again, "").items()}
    assert names == {name: [step for step, _ in values] for name, values in logged(alone, "").items()}
    for one, other in zip(used, fresh, strict=True):
        for name, value in vars(one).items():
            if isinstance(value, int | float | str | torch.Tensor | None):
                is_own = "path" in name or "time" in name or name == "_last_checkpoint_saved"
                assert is_own or value == vars(other)[name], (type(one), name)
    failing = make_net()
    failing.training_step = None
    with pytest.raises(Exception, match="not a callable"):
        fit(failing, *used, max_epochs=1, name="failing")
    assert (used[1].best_model_path, used[0].stopped_epoch) == ("", 0)


def test_learning_rates_are_in_the_history(fit, make_net):
    class Scheduled(make_net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    rates = logged(fit(Scheduled(), LearningRateMonitor(), max_epochs=3), "lr-")
    assert rates == {"lr-SGD": [(0, pytest.approx(0.05)), (6, pytest.approx(0.025)), (12, pytest.approx(0.0125))]}
    rates = logged(fit(make_net(), LearningRateMonitor("step"), max_epochs=1, log_every_n_steps=3), "lr-")
    assert rates == {"lr-SGD": [(3, pytest.approx(0.05)), (6, pytest.approx(0.05))]}


def test_throughput_and_device_stats_are_in_the_history(fit, make_net):
    class Counted(make_net):
        flops_per_batch = 100

    monitors = ThroughputMonitor(lambda batch: len(batch[0])), DeviceStatsMonitor()
    trainer = fit(Counted(), *monitors, max_epochs=2, log_every_n_steps=4)
    rates = logged(trainer, "train/")
    assert [(step, value) for step, value in rates["train/samples"]] == [(4, 32), (8, 64), (12, 96)]
    assert all(value > 0 for _, value in rates["train/device/samples_per_sec"])
    assert all(value > 0 for _, value in rates["train/device/flops_per_sec"])
    assert [step for step, _ in logged(trainer, "validate/")["validate/device/samples_per_sec"]] == [6, 12]
    stats = logged(trainer, "DeviceStatsMonitor.on_train_batch_end/")
    assert [step for step, _ in stats["DeviceStatsMonitor.on_train_batch_end/cpu_vm_percent"]] == [4, 8, 12]


def test_no_step_value_is_logged_every_zero_steps(fit, make_net):
    """Epoch values still are. Lightning 2.6 logs the same names."""
    monitors = ThroughputMonitor(lambda batch: len(batch[0])), DeviceStatsMonitor(), LearningRateMonitor("step")
    trainer = fit(make_net(), *monitors, max_epochs=2, log_every_n_steps=0)
    assert logged(trainer, "").keys() == {"train_loss_epoch", "val_loss"}
    assert trainer.global_step == 12


def test_a_module_brings_callbacks_in_any_sequence(fit, make_net):
    seen = []

    class Bringing(make_net):
        def configure_callbacks(self):
            return deque([LambdaCallback(on_fit_start=lambda trainer, module: seen.append("brought"))])

    fit(Bringing(), max_epochs=1)
    assert seen == ["brought"]


def test_accumulation_changes_with_the_epoch(fit, make_net):
    trainer = fit(make_net(), GradientAccumulationScheduler({1: 2, 3: 4}))
    assert trainer.global_step == 6 + 3 + 3 + 2


def test_a_timer_measures_and_ends_the_run(fit, make_net):
    timer = Timer()
    fit(make_net(), timer, max_epochs=1)
    assert 0 < timer.time_elapsed("validate") < timer.time_elapsed("train") < 60
    trainer = fit(make_net(), Timer({"microseconds": 1}), max_epochs=1)
    assert trainer.global_step == 1


def test_a_timer_that_is_spent_ends_the_run_that_goes_on_at_once(fit, make_net):
    fit(make_net(), Timer({"microseconds": 1}), name="run", max_epochs=3)
    trainer = fit(make_net(), Timer({"microseconds": 1}), name="run", resume="last", max_epochs=3)
    assert trainer.global_step == 1


def test_functions_are_called_at_their_hooks(fit, make_net):
    calls = []
    fit(
        make_net(),
        LambdaCallback(
            setup=lambda trainer, module, stage: calls.append(stage),
            on_train_epoch_end=lambda trainer, module: calls.append(trainer.current_epoch),
            on_train_batch_end=lambda trainer, module, outputs, batch, batch_idx: calls.append(set(outputs)),
        ),
        max_epochs=2,
        limit_train_batches=1,
    )
    assert calls == ["fit", {"loss"}, 0, {"loss"}, 1]


def test_the_checkpoint_callback_decides_which_files_are_kept(fit, make_net):
    checkpoint = ModelCheckpoint(monitor="val_loss", save_top_k=2, every_n_epochs=1)
    trainer = fit(make_net(), checkpoint, max_epochs=5)
    assert trainer.checkpoint_callback is checkpoint
    folder = Path(trainer.log_dir, "checkpoints")
    assert {str(path) for path in folder.glob("*.ckpt")} == set(checkpoint.best_k_models)
    assert len(checkpoint.best_k_models) == 2
    best = trainer.result.best_checkpoint
    assert Path(checkpoint.best_model_path).name == f"epoch={best.epoch - 1}-step={best.step}.ckpt"
    assert checkpoint.best_model_score.item() == pytest.approx(
        min(v for _, v in logged(trainer, "val_loss")["val_loss"])
    )
    assert trainer.result.last_checkpoint.step == 30


def test_state_of_every_callback_survives_a_resume(fit, make_net):
    class Counter(Callback):
        def __init__(self):
            self.count, self.loaded = 0, None

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state_dict):
            self.count = self.loaded = state_dict["count"]

    fit(make_net(), Counter(), RichProgressBar(), name="run", max_epochs=2)
    counter = Counter()
    fit(make_net(), counter, RichProgressBar(), name="run", resume="last", max_epochs=3)
    assert (counter.loaded, counter.count) == (12, 18)
