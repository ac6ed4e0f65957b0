"""Batches, rate and time left, from the messages of several ranks."""

from __future__ import annotations

import pytest

from raylight.contract.messages import EpochMetrics, Progress, StageFinished, StageStarted
from raylight.report.progress import Rate, RunProgress


def train(batch: int, epoch: int = 0, num_batches: int = 100, samples: int = 32, **values: float) -> Progress:
    return Progress("train", epoch, epoch * num_batches + batch, batch, batch * samples, values)


def epoch_values(values: dict[str, float], shown: set[str] = frozenset()) -> EpochMetrics:
    return EpochMetrics("train", 0, 0, 0.0, values, frozenset(values), frozenset(shown))


def test_the_rate_counts_the_samples_of_all_ranks():
    progress = RunProgress()
    for rank in range(3):
        progress.handle(rank, StageStarted("train", 0, 0, 100), 0.0)
    for second in range(20):
        for rank in range(3):
            progress.handle(rank, train(1 + second), float(second))
    assert progress.stages["train"].rate.value == pytest.approx(3 * 32)
    assert progress.stages["train"].num_done == 20  # steps, of which each rank does all


def test_the_rate_goes_on_from_one_epoch_to_the_next():
    progress = RunProgress()
    for epoch in range(3):
        progress.handle(0, StageStarted("train", epoch, epoch * 10, 10), epoch * 10.0)
        for batch in range(1, 11):
            progress.handle(0, train(batch, epoch, 10), epoch * 10.0 + batch)
    assert progress.stages["train"].rate.value == pytest.approx(32)
    assert progress.stages["train"].num_done == 10


def test_the_time_of_validation_does_not_lower_the_rate_of_training():
    progress = RunProgress()
    progress.handle(0, StageStarted("train", 0, 0, 100), 0.0)
    for batch in range(1, 6):
        progress.handle(0, train(batch), float(batch))
    progress.handle(0, StageStarted("validate", 0, 5, 10), 5.0)
    progress.handle(0, Progress("validate", 0, 5, 4, 400), 9.0)
    progress.handle(0, StageFinished("validate", 0, 5), 104.0)
    progress.handle(0, train(6), 105.0)
    assert progress.stages["train"].rate.value == pytest.approx(32)
    progress.handle(0, train(7), 106.0)
    assert progress.stages["train"].rate.value == pytest.approx(32)


def test_an_old_rate_leaves_the_window():
    rate = Rate()
    for second in range(100):
        rate.add(0, min(second, 50) * 100, float(second))
    assert rate.value == 0.0


def test_many_ranks_take_no_more_memory():
    rate = Rate()
    for second in range(100):
        for rank in range(100):
            rate.add(rank, second, second + rank / 100)
    assert len(rate._points) <= 60
    assert rate.value == pytest.approx(100, rel=0.15)


def test_evaluation_sums_the_batches_of_the_ranks():
    progress = RunProgress()
    progress.handle(0, StageStarted("validate", 0, 5, 10), 0.0)
    progress.handle(0, Progress("validate", 0, 5, 3, 300), 1.0)
    progress.handle(1, Progress("validate", 0, 5, 2, 200), 1.0)
    stage = progress.stages["validate"]
    assert (stage.num_done, stage.fraction) == (5, 0.5)
    assert progress.time_left_s(1.0) == pytest.approx(1.0)


def test_validation_is_nested_in_training_and_leaves_again():
    progress = RunProgress()
    progress.handle(0, StageStarted("train", 0, 0, 10), 0.0)
    progress.handle(0, StageStarted("validate", 0, 5, 10), 1.0)
    assert list(progress.stages) == ["train", "validate"]
    progress.handle(1, StageFinished("validate", 0, 5), 2.0)
    assert list(progress.stages) == ["train", "validate"]  # rank 0 is still at it
    progress.handle(0, StageFinished("validate", 0, 5), 2.0)
    progress.handle(0, StageFinished("train", 1, 10), 3.0)
    assert list(progress.stages) == ["train"]  # until the next epoch begins, or the run ends


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"max_epochs": 2}, 15.0),  # a quarter of two epochs took 5 s
        ({"max_steps": 100}, 5.0),
        ({"max_epochs": 2, "max_steps": 100}, 5.0),  # what comes first
        ({"max_epochs": 2, "max_time_s": 12.0}, 7.0),
        ({"max_time_s": 12.0}, 7.0),
        ({"max_epochs": -1}, None),
        ({}, None),
    ],
)
def test_time_left(limits, left):
    progress = RunProgress(**limits)
    progress.handle(0, StageStarted("train", 0, 0, 100), 0.0)
    assert progress.time_left_s(0.0) is None
    progress.handle(0, train(0), 0.0)
    progress.handle(0, train(50), 5.0)
    assert progress.time_left_s(5.0) == (None if left is None else pytest.approx(left))


def test_time_left_of_a_resumed_run_counts_what_it_does_itself():
    progress = RunProgress(max_epochs=10)
    progress.handle(0, StageStarted("train", 8, 800, 100), 0.0)
    progress.handle(0, train(0, 8), 0.0)
    progress.handle(0, train(100, 8), 10.0)
    assert progress.time_left_s(10.0) == pytest.approx(10.0)


def test_data_without_a_length():
    progress = RunProgress(max_epochs=4)
    progress.handle(0, StageStarted("train", 0, 0, None), 0.0)
    progress.handle(0, train(1), 0.0)
    progress.handle(0, train(30), 3.0)
    assert progress.stages["train"].fraction is None
    assert progress.time_left_s(3.0) is None
    progress.handle(0, StageStarted("train", 1, 30, None), 3.0)
    assert progress.time_left_s(3.0) == pytest.approx(9.0)


def test_messages_of_a_stage_that_rank_0_is_not_in_are_passed_over():
    progress = RunProgress()
    progress.handle(1, train(1), 0.0)
    assert not progress.stages
    assert not progress.has_begun
    progress.handle(0, StageStarted("train", 1, 10, 10), 0.0)
    progress.handle(1, train(10, epoch=0), 0.0)
    assert progress.stages["train"].num_done == 0


def test_values_shown_are_those_with_prog_bar_else_a_few():
    progress = RunProgress()
    progress.handle(0, StageStarted("train", 0, 0, 10), 0.0)
    progress.handle(0, train(1, loss=0.5), 0.0)
    progress.handle(0, epoch_values({"val_loss": 1.0, "hidden": 2.0}, {"val_loss"}), 0.0)
    assert progress.values == {"loss": 0.5, "val_loss": 1.0}
    progress = RunProgress()
    progress.handle(0, epoch_values({name: 0.0 for name in "abcdef"}), 0.0)
    assert list(progress.values) == ["a", "b", "c", "d"]
