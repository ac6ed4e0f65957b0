"""What becomes of the values that ranks log: the newest of each name, loggers, and what a failure takes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raylight.contract.messages import EpochMetrics, StepMetrics, StepRow, StepValue
from raylight.driver.journal import read_metrics
from raylight.driver.loggers import Loggers
from raylight.driver.metric_store import MetricStore
from raylight.storage.filesystem import Storage


class Closed:
    """A logger of another's: keeps what it is given, and how it was ended."""

    def __init__(self, error: Exception | None = None):
        self.given: list[tuple[int | None, dict[str, float]]] = []
        self.ends: list[str] = []
        self.error = error

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.error is not None:
            raise self.error
        self.given.append((step, metrics))

    def close(self) -> None:
        self.ends.append("closed")


class Kept(Closed):
    """One that is told how the run has ended, instead of being closed."""

    def finalize(self, status: str) -> None:
        self.ends.append(status)


def make(*loggers: Any, world_size: int = 1, files: Storage | None = None) -> tuple[MetricStore, list[str]]:
    said: list[str] = []
    return MetricStore(files, world_size, Loggers(loggers, said.append), said.append), said


def steps(*rows: tuple[int, float], name: str = "loss") -> StepMetrics:
    return StepMetrics(tuple(StepRow(step, 0, 1.0, {name: StepValue(value, 1.0, "mean")}) for step, value in rows))


def epoch(step: int, values: dict[str, float], logged: set[str], of_last_step: set[str] = frozenset()) -> EpochMetrics:
    return EpochMetrics("train", 0, step, 1.0, values, frozenset(logged), frozenset(), frozenset(of_last_step))


def test_rows_and_epochs_go_to_loggers_and_the_newest_values_are_kept() -> None:
    store, _ = make(logger := Kept())
    store.add_steps(0, steps((1, 3.0), (2, 2.0)))
    store.add_epoch(epoch(2, {"loss_epoch": 2.5, "hidden": 9.0}, {"loss_epoch"}))
    assert [(step, values["loss"]) for step, values in logger.given[:2]] == [(1, 3.0), (2, 2.0)]
    assert [(step, values["loss_epoch"]) for step, values in logger.given[2:]] == [(2, 2.5)]
    assert "hidden" not in logger.given[2][1]
    assert store.callback_metrics == {"loss": 2.0, "loss_epoch": 2.5, "hidden": 9.0}
    assert store.logged_metrics == {"loss": 2.0, "loss_epoch": 2.5}
    store.callback_metrics["loss"] = 7.0  # a copy
    assert store.callback_metrics["loss"] == 2.0


def test_a_row_of_all_ranks_counts_more_than_the_end_of_its_epoch() -> None:
    store, _ = make()
    store.add_steps(0, steps((4, 1.0)))
    store.add_epoch(epoch(4, {"loss": 5.0}, set(), {"loss"}))
    assert store.callback_metrics == store.logged_metrics == {"loss": 1.0}
    store.add_epoch(epoch(6, {"loss": 5.0}, set(), {"loss"}))  # of steps that had no row
    assert store.callback_metrics == store.logged_metrics == {"loss": 5.0}


def test_a_row_that_is_late_is_written_and_takes_nothing_back() -> None:
    store, _ = make(logger := Kept())
    store.add_epoch(epoch(6, {"loss": 5.0}, set(), {"loss"}))
    store.add_steps(0, steps((5, 1.0)))
    assert store.callback_metrics == {"loss": 5.0}
    assert logger.given[-1][0] == 5
    store.add_steps(0, steps((6, 2.0)))  # of that very step
    assert store.callback_metrics == {"loss": 2.0}


def test_what_an_earlier_attempt_measured_stands_until_there_is_a_newer_one() -> None:
    store, _ = make()
    store.take_over({"loss": 9.0, "val_loss": 8.0})
    store.add_steps(0, steps((1, 1.0)))
    assert store.callback_metrics == {"loss": 1.0, "val_loss": 8.0}
    assert store.logged_metrics == {"loss": 1.0}


def test_the_first_error_of_a_logger_is_said_once_and_others_get_their_rows() -> None:
    store, said = make(broken := Kept(OSError("full")), logger := Kept())
    store.add_steps(0, steps((1, 1.0)))
    broken.error = OSError("again")
    store.add_steps(0, steps((2, 1.0)))
    assert [step for step, _ in logger.given] == [1, 2]
    assert len(said) == 1
    assert "Kept could not log values: OSError: full" in said[0]
    broken.error = None  # it is asked again
    store.add_steps(0, steps((3, 1.0)))
    assert [step for step, _ in broken.given] == [3]


def test_values_for_one_of_several_loggers_are_on_record_once() -> None:
    store, _ = make(one := Kept(), other := Kept())
    for index in range(2):
        values = {"by_hand": float(index)}
        store.add_epoch(EpochMetrics("train", 0, 3, 1.0, values, frozenset(values), frozenset(), logger=index))
    assert [values["by_hand"] for _, values in one.given] == [0.0]
    assert [values["by_hand"] for _, values in other.given] == [1.0]
    assert store.logged_metrics == {"by_hand": 0.0}


def test_rows_that_lack_a_rank_that_is_gone_are_told() -> None:
    store, said = make(logger := Kept(), world_size=2)
    store.add_steps(0, steps((1, 1.0)))
    store.regroup(1, {1}, last_step=1)
    assert [step for step, _ in logger.given] == [1]
    assert "step 1" in said[0]
    store.regroup(1, {1}, last_step=1)
    assert len(said) == 1


def test_steps_that_are_made_again_are_not_given_to_others_twice(tmp_path: Path) -> None:
    store, _ = make(logger := Kept(), files=Storage(str(tmp_path)))
    store.add_steps(0, steps((1, 1.0), (2, 2.0), (3, 3.0)))
    store.redo_from(1, 1)
    store.add_steps(0, steps((2, 2.5), (3, 3.5), (4, 4.0)))
    assert [step for step, _ in logger.given] == [1, 2, 3, 4]
    assert store.callback_metrics == {"loss": 4.0}
    store.close("finished", merge=True)
    table = read_metrics(Storage(str(tmp_path)))
    assert (table["step"].to_pylist(), table["value"].to_pylist()) == ([1, 2, 3, 4], [1.0, 2.5, 3.5, 4.0])


def test_a_value_of_a_step_that_is_made_again_is_the_newest() -> None:
    store, _ = make()
    store.add_steps(0, steps((9, 1.0)))
    store.redo_from(2, 1)
    store.add_steps(0, steps((3, 2.0)))
    assert store.callback_metrics == {"loss": 2.0}


def test_what_is_flushed_is_on_storage(tmp_path: Path) -> None:
    files = Storage(str(tmp_path))
    store, said = make(files=files)
    store.add_steps(0, steps((1, 1.0)))
    store.flush()
    assert read_metrics(files)["step"].to_pylist() == [1]
    assert said == []
    make()[0].flush()  # where nothing is written nothing happens
    store.close("finished", merge=False)


@pytest.mark.parametrize(
    ("status", "told"),
    [("finished", "success"), ("stopped", "success"), ("interrupted", "success"), ("failed", "failed")],
)
def test_loggers_are_ended_as_lightnings_are(status: str, told: str) -> None:
    store, said = make(logger := Kept(), closed := Closed())
    store.close(status, merge=True)
    assert (logger.ends, closed.ends, said) == ([told], ["closed"], [])


def test_the_end_brings_rows_that_some_ranks_never_sent() -> None:
    store, _ = make(logger := Kept(), world_size=2)
    store.add_steps(0, steps((1, 1.0)))
    store.close("failed", merge=True)
    assert [step for step, _ in logger.given] == [1]


def test_what_fails_at_the_end_is_told_and_the_others_are_ended_all_the_same() -> None:
    class Failing(Kept):
        def finalize(self, status: str) -> None:
            raise ValueError("mine")

    class Full(Kept):
        def finalize(self, status: str) -> None:
            raise OSError("disk full")

    store, said = make(Failing(), Full(), broken := Kept(RuntimeError("late")), logger := Kept(), world_size=2)
    store.add_steps(0, steps((1, 1.0)))
    store.close("finished", merge=True)
    assert (broken.ends, logger.ends) == (["success"], ["success"])
    assert [text.partition(". Training")[0] for text in said] == [
        "Kept could not log values: RuntimeError: late",
        "Failing could not store all that was logged: ValueError: mine",
        "Full could not store all that was logged: OSError: disk full",
    ]
