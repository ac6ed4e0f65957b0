from __future__ import annotations

import io
import math

import pytest
import torch

from raylight.callbacks import EarlyStopping, EarlyStoppingReason
from raylight.contract.errors import InvalidArguments


def run_epochs(stopping, rank, values, name="val_loss"):
    """Feed one value an epoch; the epochs that were begun before training stopped."""
    for epoch, value in enumerate(values, start=rank.current_epoch):
        rank.current_epoch = epoch
        rank.callback_metrics = {name: torch.tensor(value)}
        stopping.on_train_epoch_end(rank, None)
        if rank.should_stop:
            return epoch + 1
    return len(values)


def test_patience_counts_checks_without_improvement(make_rank):
    rank, stopping = make_rank(), EarlyStopping("val_loss", patience=2)
    assert run_epochs(stopping, rank, [3.0, 2.0, 2.5, 1.0, 1.1, 1.2, 0.5]) == 6
    assert stopping.stopped_epoch == 5
    assert stopping.best_score == 1.0
    assert stopping.wait_count == 2
    assert stopping.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert "did not improve in the last 2 checks" in stopping.stopping_reason_message
    assert rank.notices == [(f"EarlyStopping stops training: {stopping.stopping_reason_message}", "info")]


def test_zero_patience_stops_at_the_first_check_that_is_no_better(make_rank):
    assert run_epochs(EarlyStopping("val_loss", patience=0), make_rank(), [3.0, 2.0, 2.0, 1.0]) == 3


def test_max_mode_wants_growth(make_rank):
    assert run_epochs(EarlyStopping("val_loss", mode="max", patience=1), make_rank(), [0.1, 0.5, 0.9, 0.8]) == 4


@pytest.mark.parametrize(("mode", "values"), [("min", [1.0, 0.95, 0.89, 0.85]), ("max", [1.0, 1.05, 1.11, 1.15])])
def test_min_delta_must_be_exceeded_against_the_best_score(make_rank, mode, values):
    stopping = EarlyStopping("val_loss", min_delta=0.1, patience=2, mode=mode)
    assert run_epochs(stopping, make_rank(), values) == 4
    assert stopping.wait_count == 1
    assert stopping.best_score == pytest.approx(values[2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stops(make_rank, value):
    stopping = EarlyStopping("val_loss", patience=9)
    assert run_epochs(stopping, make_rank(), [1.0, value, 0.5]) == 2
    assert stopping.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC
    assert run_epochs(EarlyStopping("val_loss", patience=9, check_finite=False), make_rank(), [1.0, value, 0.5]) == 3


def test_thresholds_stop_at_once(make_rank):
    stopping = EarlyStopping("val_loss", stopping_threshold=0.5, divergence_threshold=10.0)
    assert run_epochs(stopping, make_rank(), [1.0, 0.5, 0.4, 0.3]) == 3
    assert stopping.stopping_reason is EarlyStoppingReason.STOPPING_THRESHOLD
    stopping = EarlyStopping("val_loss", stopping_threshold=0.5, divergence_threshold=10.0)
    assert run_epochs(stopping, make_rank(), [1.0, 10.0, 10.1, 0.1]) == 3
    assert stopping.stopping_reason is EarlyStoppingReason.DIVERGENCE_THRESHOLD
    stopping = EarlyStopping("val_loss", mode="max", stopping_threshold=0.9, divergence_threshold=0.1)
    assert run_epochs(stopping, make_rank(), [0.5, 0.05]) == 2
    assert stopping.stopping_reason is EarlyStoppingReason.DIVERGENCE_THRESHOLD


def test_a_metric_that_was_never_logged_names_those_that_were_nearest_first(make_rank):
    rank = make_rank()
    rank.callback_metrics = {name: torch.tensor(1.0) for name in ("accuracy", "train_loss", "val_los")}
    with pytest.raises(InvalidArguments, match=r"'val_loss' was not logged.*Logged so far: val_los, train_loss, acc"):
        EarlyStopping("val_loss").on_train_epoch_end(rank, None)
    lenient = EarlyStopping("val_loss", strict=False, verbose=True)
    lenient.on_train_epoch_end(rank, None)
    assert not rank.should_stop
    assert rank.notices[0][1] == "warning"


def test_checks_after_validation_where_that_is_not_once_an_epoch(make_rank):
    often = make_rank({"val_check_interval": 0.5})
    often.callback_metrics = {"val_loss": torch.tensor(math.nan)}
    stopping = EarlyStopping("val_loss")
    stopping.on_train_epoch_end(often, None)
    assert not often.should_stop
    often.stage = "sanity"
    stopping.on_validation_end(often, None)
    assert not often.should_stop
    often.stage = "validate"
    stopping.on_validation_end(often, None)
    assert often.should_stop

    alone = make_rank({"val_check_interval": 0.5}, fitting=False, stage="validate")
    alone.callback_metrics = {"val_loss": torch.tensor(math.nan)}
    stopping.on_validation_end(alone, None)
    assert not alone.should_stop

    without = make_rank({"check_val_every_n_epoch": 2}, num_val_batches=[])
    without.callback_metrics = {"val_loss": torch.tensor(math.nan)}
    stopping.on_train_epoch_end(without, None)
    assert without.should_stop


def test_ranks_agree_on_a_value_that_may_be_each_ranks_own(make_rank):
    rank = make_rank({"val_check_interval": 0.5}, world_size=2, stage="validate")
    rank.callback_metrics = {"loss": torch.tensor(1.0)}
    rank.broadcast = lambda value, src=0: torch.tensor(math.nan)
    EarlyStopping("loss").on_validation_end(rank, None)
    assert rank.should_stop


def test_fast_dev_run_never_stops(make_rank):
    rank = make_rank({"fast_dev_run": 1})
    EarlyStopping("never_logged").on_train_epoch_end(rank, None)
    assert not rank.should_stop


def test_state_survives_a_checkpoint_file(make_rank):
    rank, stopping = make_rank(), EarlyStopping("val_loss", patience=3)
    run_epochs(stopping, rank, [1.0, 1.0 / 3.0, 2.0, 2.0])
    file = io.BytesIO()
    torch.save(stopping.state_dict(), file)
    file.seek(0)
    resumed = EarlyStopping("val_loss", patience=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state_dict() == stopping.state_dict()
    assert resumed.wait_count == 2
    assert run_epochs(resumed, make_rank(current_epoch=4), [2.0, 0.1]) == 5


def test_two_of_them_keep_separate_states():
    assert EarlyStopping("a").state_key != EarlyStopping("b").state_key
    assert EarlyStopping("a").state_key != EarlyStopping("a", mode="max").state_key


def test_all_mistakes_are_told_at_once():
    with pytest.raises(InvalidArguments) as caught:
        EarlyStopping("", patience=-1, mode="minimum", min_delta="small")
    assert len(caught.value.mistakes) == 4
    assert "Did you mean 'min'?" in str(caught.value)
