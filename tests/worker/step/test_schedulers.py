"""When learning rate schedulers step, and with which value."""

from __future__ import annotations

from typing import Any

import pytest

import raylight as pl
from raylight.contract.errors import InvalidArguments
from raylight.worker.step.optimizers import SchedulerConfig
from raylight.worker.step.schedulers import step_schedulers
from raylight.worker.worker import Worker
from tests.worker.ranks import in_group, make_worker


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.stepped: list[tuple[str, Any]] = []

    def lr_scheduler_step(self, scheduler, metric):
        self.stepped.append((scheduler, metric))


def make(*configs: SchedulerConfig, place: Any = None) -> Worker:
    worker = make_worker(Net(), place=place)
    worker.optimizers.take([], list(configs))
    return worker


def test_each_steps_at_its_own_interval_and_frequency():
    worker = make(
        SchedulerConfig("every step", "step"), SchedulerConfig("every third step", "step", 3),
        SchedulerConfig("every epoch"), SchedulerConfig("plateau", reduce_on_plateau=True, monitor="x", strict=False),
    )  # fmt: skip
    for count in (1, 2, 3):
        step_schedulers(worker, "step", count)
    assert worker.module.stepped == [("every step", None)] * 3 + [("every third step", None)]
    step_schedulers(worker, "epoch", 1)
    assert worker.module.stepped[4:] == [("every epoch", None)]


def test_by_hand_none_steps():
    worker = make(SchedulerConfig("every step", "step"))
    worker.module.automatic_optimization = False
    step_schedulers(worker, "step", 1)
    assert worker.module.stepped == []


def test_one_on_a_plateau_gets_what_it_monitors():
    watching = {"reduce_on_plateau": True, "monitor": "val_loss"}
    worker = make(SchedulerConfig("strict", **watching), SchedulerConfig("plain"))
    with pytest.raises(InvalidArguments, match="val_loss"):
        step_schedulers(worker, "epoch", 1, plateau=True)
    worker.metrics.restore({"val_loss": 0.5}, {})
    step_schedulers(worker, "epoch", 1, plateau=True)
    assert worker.module.stepped == [("strict", 0.5)]
    lenient = SchedulerConfig("lenient", strict=False, **watching)
    worker = make(lenient, SchedulerConfig("after", reduce_on_plateau=True, monitor="x"))
    worker.metrics.restore({"x": 2.0}, {})
    step_schedulers(worker, "epoch", 1, plateau=True)
    assert worker.module.stepped == [("after", 2.0)]


def _step_on_a_plateau(place) -> list[Any]:
    watching = {"reduce_on_plateau": True, "monitor": "loss"}
    worker = make(SchedulerConfig("step", "step", **watching), SchedulerConfig("epoch", **watching), place=place)
    worker.metrics.restore({"loss": float(place.rank)}, {})
    step_schedulers(worker, "step", 1, plateau=True)
    step_schedulers(worker, "epoch", 1, plateau=True)
    return worker.module.stepped


def test_the_value_of_a_step_is_the_mean_over_the_ranks():
    first, second = in_group(_step_on_a_plateau)
    assert first == [("step", 0.5), ("epoch", 0.0)]
    assert second == [("step", 0.5), ("epoch", 1.0)]
