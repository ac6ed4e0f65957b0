"""Shares of an epoch: folded in any portions and over any ranks they give the same digits."""

from __future__ import annotations

import math

import pytest
import torch

from raylight.worker.metrics import epoch_shares as shares
from raylight.worker.metrics.metrics import Metrics

VALUES = [0.1 * number**2 - 3 for number in range(50)]
WEIGHTS = [float(1 + number % 4) for number in range(50)]


@pytest.mark.parametrize("reduce", ["mean", "sum", "min", "max"])
def test_portions_do_not_show(reduce):
    pairs = shares.make_pairs(reduce, VALUES, WEIGHTS)
    at_once = shares.fold(reduce, pairs)
    in_portions = []
    for start in (0, 1, 7, 30):
        stop = {0: 1, 1: 7, 7: 30, 30: 50}[start]
        in_portions = shares.fold(reduce, in_portions + pairs[start:stop])
    assert in_portions == at_once
    expected = {
        "mean": sum(v * w for v, w in zip(VALUES, WEIGHTS, strict=True)) / sum(WEIGHTS), "sum": sum(VALUES),
        "min": min(VALUES), "max": max(VALUES),
    }  # fmt: skip
    assert shares.reduce_pairs(reduce, at_once) == pytest.approx(expected[reduce], rel=1e-12)


@pytest.mark.parametrize("reduce", ["mean", "sum", "min", "max"])
def test_a_nan_is_not_lost(reduce):
    pairs = shares.make_pairs(reduce, [1.0, float("nan"), 2.0], [1, 1, 1])
    assert math.isnan(shares.reduce_pairs(reduce, pairs))


def test_a_callable_gets_all_values():
    pairs = shares.fold("callable", shares.make_pairs("callable", [3.0, 1.0, 2.0], [1, 1, 1]))
    assert shares.reduce_pairs(torch.median, pairs) == 2.0


def log(metrics: Metrics, name: str, value: float, reduce: str = "mean", **arguments) -> None:
    given = {"on_step": False, "on_epoch": True, "batch_size": 1, **arguments}
    metrics.log(
        name, value, prog_bar=True, logger=True, reduce_fx=reduce, add_dataloader_idx=True, metric_attribute=None,
        **given,
    )  # fmt: skip


def make_metrics(world_size: int = 2) -> Metrics:
    metrics = Metrics(torch.nn.Linear(1, 1), world_size)
    metrics.stage = "train"
    return metrics


def test_a_share_goes_through_a_checkpoint_and_to_another_rank(monkeypatch):
    monkeypatch.setattr("raylight.worker.metrics.metrics.gather_objects", lambda mine, world_size: [mine])
    first, second = make_metrics(), make_metrics()
    for value in (1.0, 2.0):
        log(first, "loss", value, batch_size=3)
        log(first, "steps", 1.0, "sum")
        log(first, "only_here", value, "max")
    second.carried = shares.unpack(shares.pack(first.epoch_share()))
    log(second, "loss", 9.0)
    log(second, "steps", 1.0, "sum")
    epoch = second.finish_epoch("train", 0, 3)
    assert epoch.values == {"loss": pytest.approx(18 / 7), "steps": 3.0, "only_here": 2.0}
    assert epoch.shown == epoch.logged == set(epoch.values)
    assert second.epoch_share() == {}


def test_rollback_takes_back_one_step_whatever_was_folded_before():
    metrics = make_metrics()
    for value in (1.0, 2.0, 3.0):
        metrics.begin_batch(1)
        log(metrics, "loss", value, "sum")
        metrics.end_step()
        if value == 2.0:
            assert metrics.epoch_share()["loss"][1] == [(3.0, 2)]
    metrics.begin_batch(1)
    log(metrics, "loss", 100.0, "sum")
    log(metrics, "new", 100.0, "sum")
    metrics.rollback()
    share = metrics.epoch_share()
    assert share["loss"][1] == [(6.0, 3)]
    assert "new" not in share


def test_rollback_forgets_an_evaluation_and_keeps_the_step_before_it():
    metrics = make_metrics()
    metrics.begin_batch(1)
    log(metrics, "loss", 1.0)
    metrics.end_step()
    metrics.stage = "validate"
    for _ in range(2000):
        metrics.end_step()
        metrics.begin_batch(1)
        log(metrics, "val_loss", 5.0)
    metrics.rollback()
    assert metrics.epoch_share()["loss"][1] == [(1.0, 1)]
    assert not any(series.values or series.folded for series in metrics.series.values() if series.stage == "validate")
