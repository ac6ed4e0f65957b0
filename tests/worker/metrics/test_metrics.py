"""What is logged on one rank and on two, and what the loop reads of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from raylight.contract.errors import InvalidArguments
from raylight.contract.messages import StepValue
from raylight.worker.metrics import metrics as metrics_module
from raylight.worker.metrics.metrics import Metrics
from tests.worker.ranks import in_group


def make(world_size: int = 1, module: nn.Module | None = None, stage: str = "train", in_step: bool = True) -> Metrics:
    metrics = Metrics(module or nn.Linear(1, 1), world_size, tell=TOLD.append)
    TOLD.clear()
    metrics.enter(stage, in_step=in_step)
    metrics.begin_batch(2, 0)
    return metrics


TOLD: list[str] = []


def log(metrics: Metrics, name: Any, value: Any, **options: Any) -> None:
    given = {
        "prog_bar": False, "logger": None, "on_step": None, "on_epoch": None, "reduce_fx": "mean",
        "add_dataloader_idx": True, "batch_size": None, "metric_attribute": None,
    }  # fmt: skip
    metrics.log(name, value, **{**given, **options})


def values_of(metrics: Metrics, stage: str = "train", step: int = 1) -> dict[str, float]:
    return metrics.finish_epoch(stage, 0, step).values


# ---- what counts, and how


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"loss"}),
        ({"on_step": True}, {"loss"}),
        ({"on_epoch": True}, {"loss", "loss_step", "loss_epoch"}),
        ({"on_step": True, "on_epoch": True}, {"loss", "loss_step", "loss_epoch"}),
        ({"on_step": False, "on_epoch": True}, {"loss"}),
    ],
)
def test_names_of_a_value_that_a_training_step_logs(options, names):
    metrics = make()
    log(metrics, "loss", 1.0, **options)
    metrics.begin_batch(6, 1)
    log(metrics, "loss", 2.0, **options)
    values = values_of(metrics)
    assert set(values) == names
    assert values["loss"] == (1.75 if options.get("on_epoch") else 2.0)
    assert values.get("loss_step", 2.0) == 2.0


@pytest.mark.parametrize(("stage", "in_step"), [("train", False), ("validate", True), ("test", False)])
def test_outside_of_a_training_step_the_epochs_value_is_kept(stage, in_step):
    metrics = make(stage=stage, in_step=in_step)
    log(metrics, "x", 1.0)
    log(metrics, "y", 1.0, on_step=True)
    log(metrics, "y", 3.0, on_step=True)
    assert [text.split(":")[0] for text in TOLD] == ["log('y', on_step=True)"]
    metrics.record(1, 0)
    assert metrics.drain() is None
    values = values_of(metrics, stage)
    assert values == {"x": 1.0, "y": 2.0, "y_epoch": 2.0}


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [
        ("mean", 3.25), ("avg", 3.25), ("sum", 6.0), ("min", 2.0), ("max", 4.0), (torch.mean, 3.25), (torch.sum, 6.0),
        (torch.min, 2.0), (torch.max, 4.0), (torch.prod, 8.0),
    ],
)  # fmt: skip
def test_reductions(reduce_fx, expected):
    metrics = make(stage="validate")
    log(metrics, "x", 2.0, reduce_fx=reduce_fx, batch_size=3)
    log(metrics, "x", 4.0, reduce_fx=reduce_fx, batch_size=5)
    assert values_of(metrics, "validate") == {"x": pytest.approx(expected)}


@pytest.mark.parametrize(
    ("name", "stage", "options", "said"),
    [
        (3, "train", {}, r"log\(name=3\): a name is a str, not int"),
        ("a\x1b", "train", {}, "no characters that control a terminal"),
        ("x", "", {}, "outside of every epoch"),
        ("x", "predict", {}, "prediction collects outputs"),
        ("x", "train", {"reduce_fx": "median"}, "reduce_fx='median'"),
        ("x", "train", {"reduce_fx": 3}, "reduce_fx=3"),
    ],
)
def test_what_cannot_be_logged_is_an_error(name, stage, options, said):
    with pytest.raises(InvalidArguments, match=said):
        log(make(stage=stage), name, 1.0, **options)


def test_loaders_have_names_of_their_own_unless_that_is_not_wanted():
    metrics = make(stage="validate")
    for index in (0, 1):
        metrics.enter_loader(index)
        log(metrics, "x", float(index))
        log(metrics, "all", float(index), add_dataloader_idx=index == 0)
    metrics.enter_loader(None)
    log(metrics, "alone", 5.0)
    assert values_of(metrics, "validate") == {
        "x/dataloader_idx_0": 0.0, "x/dataloader_idx_1": 1.0, "all/dataloader_idx_0": 0.0, "all": 1.0, "alone": 5.0
    }  # fmt: skip


def test_a_batch_size_that_nobody_gave_is_guessed_once_a_batch_and_told_once():
    asked = []

    def guess() -> int | None:
        asked.append(1)
        return 4 if len(asked) == 1 else None

    metrics = make(stage="validate")
    metrics.begin_batch(guess)
    log(metrics, "a", 1.0)
    log(metrics, "b", 1.0, reduce_fx="sum")
    log(metrics, "c", 1.0, batch_size=2)
    metrics.begin_batch(guess)
    log(metrics, "a", 6.0)
    log(metrics, "a", 6.0)
    assert len(asked) == 2
    values = values_of(metrics, "validate")
    assert values["a"] == pytest.approx((4 + 12) / 6)
    assert len(TOLD) == 1
    assert "the mean of 'a'; to have it exact, pass log('a', ..., batch_size=n)" in TOLD[0]
    metrics.begin_batch(lambda: 1)
    log(metrics, "a", 1.0)
    values_of(metrics, "validate")
    assert len(TOLD) == 1
    metrics.begin_batch(7)
    log(metrics, "d", 1.0)
    values_of(metrics, "validate")
    assert len(TOLD) == 1


# ---- rows


def test_a_row_holds_what_was_logged_since_the_last():
    metrics = make()
    log(metrics, "loss", 1.0, prog_bar=True)
    log(metrics, "hidden", 5.0, logger=False)
    log(metrics, "top", 2.0, reduce_fx="max", on_epoch=True)
    log(metrics, "epoch", 2.0, on_step=False, on_epoch=True)
    metrics.end_step()
    metrics.record(1, 0)
    metrics.record(2, 0)
    metrics.begin_batch(3, 1)
    log(metrics, "loss", 4.0, prog_bar=True)
    metrics.end_step()
    metrics.record(3, 1)
    drained = metrics.drain()
    assert drained is not None
    assert [(row.step, row.epoch, row.values) for row in drained.rows] == [
        (1, 0, {"loss": StepValue(1.0, 2.0, "mean"), "top_step": StepValue(2.0, 2.0, "max")}),
        (3, 1, {"loss": StepValue(4.0, 3.0, "mean")}),
    ]
    assert all(row.time > 1e9 for row in drained.rows)
    assert metrics.drain() is None
    assert metrics.shown() == {"loss": 4.0}
    assert metrics.logged() == {"loss": 4.0, "top_step": 2.0}
    assert metrics.newest() == {"loss": 4.0, "hidden": 5.0, "top": 2.0, "top_step": 2.0}


def test_of_what_is_logged_per_step_alone_no_more_than_the_newest_is_held_after_a_row():
    metrics = make()
    for number in range(5):
        log(metrics, "loss", float(number))
        log(metrics, "both", float(number), on_epoch=True)
    metrics.record(1, 0)
    assert [len(series.values) for series in metrics.series.values()] == [1, 5]
    log(metrics, "loss", 9.0)
    assert values_of(metrics)["loss"] == 9.0


def test_many_batches_are_folded_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(metrics_module, "KEEP", 4)
    metrics = make()
    held = []
    for number in range(10):
        metrics.begin_batch(1, number)
        log(metrics, "loss", float(number), on_step=False, on_epoch=True)
        metrics.end_step()
        held.append(len(metrics.series["train", "loss", None, True].values))
    assert held == [1, 2, 0, 1, 2, 3, 0, 1, 2, 3]
    assert values_of(metrics) == {"loss": 4.5}


# ---- stages


def test_what_is_set_aside_counts_for_nothing():
    metrics = make(stage="validate", in_step=False)
    log(metrics, "x", 1.0)
    with metrics.set_aside():
        assert (metrics.stage, metrics.hook_is_step) == ("train", True)
        log(metrics, "x", 9.0)
    assert (metrics.stage, metrics.hook_is_step) == ("validate", False)
    with metrics.outside(), pytest.raises(InvalidArguments):
        log(metrics, "x", 9.0)
    with metrics.inside("test", True):
        log(metrics, "x", 7.0)
    assert values_of(metrics, "validate") == {"x": 1.0}
    assert values_of(metrics, "test") == {"x": 7.0}


def test_what_an_epoch_has_left_can_be_read_until_it_is_forgotten():
    metrics = make()
    log(metrics, "loss", 1.0, on_epoch=True, prog_bar=True)
    log(metrics, "quiet", 2.0, on_step=False, on_epoch=True, logger=False)
    found = metrics.finish_epoch("train", 3, 12)
    assert (found.stage, found.epoch, found.step) == ("train", 3, 12)
    assert (found.logged, found.shown) == ({"loss_epoch"}, {"loss_epoch"})
    assert found.of_last_step == {"loss_step"}
    assert metrics.shown() == {"loss_epoch": 1.0}
    assert metrics.logged() == {"loss_epoch": 1.0, "loss_step": 1.0}
    assert metrics.newest() == {"loss": 1.0, "loss_step": 1.0, "loss_epoch": 1.0, "quiet": 2.0}
    assert metrics.find_carried(12) == {}
    assert metrics.find_carried(13) == dict.fromkeys(metrics.newest(), 12)
    log(metrics, "loss", 3.0, on_epoch=True, prog_bar=True)
    assert metrics.find_carried(13) == {"loss_epoch": 12, "quiet": 12}
    assert metrics.newest()["loss"] == 3.0
    metrics.forget()
    assert metrics.logged() == {"loss_step": 3.0}
    metrics.restore({"val": 2.0}, {"val": 5})
    assert metrics.find_carried(6) == {"val": 5}


# ---- what is taken back


def test_a_step_that_broke_is_taken_back_and_may_come_back():
    metrics = make()
    log(metrics, "loss", 1.0, on_epoch=True)
    metrics.end_step()
    metrics.record(1, 0)
    metrics.begin_batch(4, 1)
    log(metrics, "loss", 9.0, on_epoch=True)
    log(metrics, "new", 2.0, on_step=False, on_epoch=True)
    metrics.rollback()
    assert metrics.epoch_share()["loss"][1] == [(2.0, 2)]
    assert "new" not in metrics.epoch_share()
    metrics.bring_back()
    assert metrics.epoch_share()["loss"][1] == [(38.0, 6)]
    metrics.record(2, 0)
    drained = metrics.drain()
    assert drained is not None
    assert [row.values for row in drained.rows] == [
        {"loss_step": StepValue(1.0, 2.0, "mean")}, {"loss_step": StepValue(9.0, 4.0, "mean")}
    ]  # fmt: skip
    metrics.bring_back()
    assert metrics.epoch_share()["loss"][1] == [(38.0, 6)]


def test_a_step_that_came_back_is_whole_when_the_next_one_breaks():
    metrics = make()
    log(metrics, "loss", 9.0, on_epoch=True)
    metrics.rollback()
    metrics.bring_back()
    metrics.begin_batch(2, 1)
    log(metrics, "loss", 1.0, on_epoch=True)
    metrics.rollback()
    assert metrics.epoch_share()["loss"][1] == [(18.0, 2)]


def test_an_epoch_whose_end_failed_has_not_ended():
    metrics = make()
    log(metrics, "loss", 1.0, on_epoch=True)
    metrics.end_step()
    assert metrics.keep_share()["loss"][1] == [(2.0, 2)]
    metrics.finish_epoch("train", 0, 1)
    metrics.rollback()
    metrics.enter("train", in_step=True)
    log(metrics, "loss", 3.0, on_epoch=True)
    assert values_of(metrics) == {"loss_step": 3.0, "loss": 2.0, "loss_epoch": 2.0}
    metrics.end_epoch()
    metrics.rollback()
    assert values_of(metrics) == {}


def test_what_others_logged_counts_once():
    metrics = make()
    log(metrics, "loss", 1.0, on_step=False, on_epoch=True)
    share = metrics.epoch_share()
    metrics.finish_epoch("train", 0, 1)
    metrics.carry(share)
    assert metrics.epoch_share() == share
    assert values_of(metrics, "validate") == {}
    assert values_of(metrics) == {"loss": 1.0}
    assert values_of(metrics) == {}


def test_the_share_of_a_training_epoch_is_that_of_its_epoch_values_alone():
    metrics = make()
    log(metrics, "step", 1.0)
    log(metrics, "epoch", 1.0, on_step=False, on_epoch=True)
    log(metrics, "total", Total(), on_epoch=True)
    metrics.enter("validate")
    log(metrics, "val", 1.0)
    metrics.enter("train", in_step=True)
    metrics.end_step()
    assert set(metrics.epoch_share()) == set(metrics.keep_share()) == {"epoch"}
    assert metrics.finish_epoch("train", 0, 1).values["step"] == 1.0
    metrics.rollback()
    assert metrics.newest()["step"] == 1.0
    assert set(values_of(metrics, "validate")) == set()


# ---- torchmetrics


class Total:
    """As torchmetrics has them: collects, computes and begins anew."""

    def __init__(self):
        self.seen: list[float] = []
        self.num_resets = 0

    def update(self, value: float) -> None:
        self.seen.append(value)

    def compute(self) -> float:
        return sum(self.seen)

    def reset(self) -> None:
        self.seen, self.num_resets = [], self.num_resets + 1


def test_a_metric_keeps_its_state_until_the_hooks_of_the_epochs_end_are_done():
    metrics, total = make(stage="validate"), Total()
    total.update(3.0)
    log(metrics, "total", total)
    total.update(4.0)
    log(metrics, "total", total)
    assert values_of(metrics, "validate") == {"total": 7.0}
    assert total.num_resets == 0
    metrics.end_epoch()
    metrics.end_epoch()
    assert total.num_resets == 1
    total.update(1.0)
    log(metrics, "total", total)
    metrics.rollback()
    assert total.num_resets == 2
    assert values_of(metrics, "validate") == {}


def test_a_metric_of_single_steps_begins_anew_with_each_epoch():
    metrics, total = make(), Total()
    total.update(3.0)
    log(metrics, "total", total, on_step=True, on_epoch=False)
    values_of(metrics)
    assert total.num_resets == 0
    metrics.end_epoch()
    assert total.num_resets == 1


def test_a_metric_of_training_keeps_what_a_broken_step_gave_it():
    metrics, total = make(), Total()
    total.update(3.0)
    log(metrics, "total", total, on_epoch=True)
    assert metrics.newest() == {"total": 3.0, "total_step": 3.0}
    assert "total" not in metrics.epoch_share()
    metrics.keep_share()
    assert values_of(metrics)["total"] == 3.0
    metrics.rollback()  # the hooks of the epoch's end have failed
    metrics.end_epoch()
    assert total.num_resets == 0
    assert values_of(metrics)["total"] == 3.0
    metrics.end_epoch()
    assert total.num_resets == 1


def test_a_metric_and_a_number_under_one_name_are_an_error():
    metrics = make(stage="validate")
    log(metrics, "x", Total())
    with pytest.raises(InvalidArguments, match="were logged under one name"):
        log(metrics, "x", 1.0)
    values_of(metrics, "validate")
    metrics.end_epoch()
    log(metrics, "x", 1.0)
    assert values_of(metrics, "validate") == {"x": 1.0}


# ---- two ranks


class Counter(nn.Module):
    """A metric that is a part of the module, which sums over the ranks."""

    def __init__(self):
        super().__init__()
        self.value = 0.0

    def update(self, value: float) -> None:
        self.value += value

    def compute(self) -> float:
        total = torch.tensor(self.value)
        torch.distributed.all_reduce(total)
        return total.item()

    def reset(self) -> None:
        self.value = 0.0


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.counter = Counter()


def _log_on_two(place) -> Any:
    module = Holder()
    metrics = make(2, module)
    first = place.rank == 0
    for name in ("mean", "sum", "min", "max"):
        value, size = (1.0, 1) if first else (4.0, 2)
        log(metrics, name, value, reduce_fx=name, on_step=False, on_epoch=True, batch_size=size)
    log(metrics, "product", 2.0 + place.rank, reduce_fx=torch.prod, on_step=False, on_epoch=True)
    log(metrics, f"of_{place.rank}", 5.0, on_step=False, on_epoch=True)
    log(metrics, "newest", 1.0 if first else 3.0, prog_bar=True)
    if first:
        metrics.begin_batch(2, 1)
        log(metrics, "newest", 7.0, prog_bar=True)  # the other rank has no sample in the last step
        log(metrics, "product", 5.0, reduce_fx=torch.prod, on_step=False, on_epoch=True)
        log(metrics, "of_function", 3.0, reduce_fx=torch.median, on_step=False, on_epoch=True)
        module.counter.update(6.0)
        log(metrics, "counted", module.counter, on_step=False, on_epoch=True)
    found = metrics.finish_epoch("train", 0, 2)
    return found.values, sorted(found.logged), sorted(found.of_last_step), metrics.logged(), metrics.newest()


def test_two_ranks_have_the_values_that_one_would_have():
    first, second = in_group(_log_on_two)
    assert first == second
    values, logged, of_last_step, for_loggers, newest = first
    assert values == {
        "mean": pytest.approx(3.0), "sum": 5.0, "min": 1.0, "max": 4.0, "product": 30.0, "of_0": 5.0, "of_1": 5.0,
        "newest": 7.0, "of_function": 3.0, "counted": 6.0,
    }  # fmt: skip
    assert logged == sorted(set(values) - {"newest"})
    assert of_last_step == ["newest"]
    assert for_loggers == newest == values


def test_a_group_that_has_shrunk_asks_nobody():
    metrics = make(2)
    metrics.resize(1)
    log(metrics, "x", math.inf, on_step=False, on_epoch=True)
    assert values_of(metrics) == {"x": math.inf}
