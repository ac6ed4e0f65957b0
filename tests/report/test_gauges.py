"""What Prometheus is told of a run, from the messages of its ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raylight.contract.messages import Died, Finished, Message, Progress, Saved, StageStarted
from raylight.report.gauges import GAUGES, Gauges, find_loss


class Watch:
    """Gauges of a run that stands at step 7, and a clock that is set by hand."""

    def __init__(self, **run: Any) -> None:
        self.now = 0.0
        self.published: list[dict[str, float]] = []
        facts = {"step": 7, "world_size": 2, "num_restarts": 0, "logged_metrics": {}} | run
        self.gauges = Gauges(SimpleNamespace(**facts), self.published.append, lambda: self.now)  # type: ignore[arg-type]

    def hear(self, now: float, rank: int, message: Message) -> dict[str, float]:
        self.now = now
        self.gauges.handle(rank, message)
        return {name.removeprefix("raylight_"): value for name, value in self.gauges.read().items()}


def progress(num_samples: int, waited_s: float = 0.0, stage: str = "train") -> Progress:
    return Progress(stage, 0, 1, 1, num_samples, {}, waited_s)


def saved(directory: str, stall_s: float) -> Saved:
    return Saved(directory, 1, 0, (), {}, False, stall_s, 0.0)


def test_what_is_not_known_yet_is_left_out() -> None:
    known = Watch().hear(0, 0, StageStarted("train", 0, 0, 10))
    assert known == {"step": 7, "samples_per_s": 0, "world_size": 2, "restarts": 0}
    whole = Watch(logged_metrics={"loss": 0.5}, num_restarts=2)
    whole.hear(0, 0, progress(0))
    whole.hear(0, 0, saved("a", 0.1))
    assert {f"raylight_{name}" for name in whole.hear(2, 0, progress(10))} == set(GAUGES)


def test_samples_of_all_ranks_count_and_those_of_validation_do_not() -> None:
    watch = Watch()
    for rank in (0, 1):
        watch.hear(0, rank, progress(0))
        watch.hear(0, rank, progress(5, stage="validate"))
    watch.hear(4, 0, progress(100))
    assert watch.hear(5, 1, progress(100))["samples_per_s"] == 40


def test_nothing_is_trained_while_the_group_is_made_anew() -> None:
    watch = Watch()
    watch.hear(0, 0, progress(0))
    assert watch.hear(1, 0, progress(100))["samples_per_s"] == 100
    assert watch.hear(2, 1, Died("killed"))["samples_per_s"] == 0


def test_the_wait_for_data_is_that_of_the_last_seconds_of_the_rank_that_waits_most() -> None:
    watch = Watch()
    for now in range(0, 31):
        watch.hear(now, 0, progress(now, waited_s=0.1 * now))
        known = watch.hear(now, 1, progress(now, waited_s=min(0.5 * now, 10.0)))
        if now == 9:
            assert known["data_wait_ratio"] == pytest.approx(0.5)
    assert known["data_wait_ratio"] == pytest.approx(0.1)
    watch.hear(31, 0, progress(31, waited_s=0.0))  # it began anew
    assert watch.hear(33, 0, progress(32, waited_s=0.6))["data_wait_ratio"] == pytest.approx(0.3)


def test_the_stall_is_the_longest_of_the_newest_checkpoint() -> None:
    watch = Watch()
    watch.hear(0, 0, saved("one", 0.3))
    assert watch.hear(0, 1, saved("one", 0.2))["checkpoint_stall_s"] == 0.3
    assert watch.hear(0, 0, saved("two", 0.1))["checkpoint_stall_s"] == 0.1


def test_it_publishes_once_a_second_and_at_the_end() -> None:
    watch = Watch()
    for tenth in range(0, 25):
        watch.hear(tenth / 10, 0, progress(tenth))
    assert len(watch.published) == 3
    watch.hear(2.5, 0, Finished("finished", 7, 1))
    assert len(watch.published) == 4


@pytest.mark.parametrize(
    ("values", "loss"),
    [
        ({"train_loss": 1.0, "val_loss": 2.0, "lr": 0.1}, 1.0),
        ({"train/loss_step": 1.0, "train/loss": 3.0, "test_loss": 2.0}, 3.0),
        ({"val_loss": 2.0, "accuracy": 0.5}, None),
    ],
)
def test_which_value_is_the_training_loss(values: dict[str, float], loss: float | None) -> None:
    assert find_loss(values) == loss
