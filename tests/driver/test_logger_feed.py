"""Each row reaches a logger once, whether or not it can take rows back."""

from __future__ import annotations

from raylight.contract.messages import EpochMetrics
from raylight.driver.epoch_rows import EpochRows
from raylight.driver.logger_feed import LoggerFeed


class Service:
    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


class Own(Service):
    def log_metrics(self, metrics, step, seconds):
        self.rows.append((step, seconds))

    def drop_after(self, step):
        self.rows = [row for row in self.rows if row[0] <= step]


def give(feed: LoggerFeed, *steps: int) -> None:
    for step in steps:
        feed.give({"loss": float(step)}, step, 0, 7.0)


def test_one_that_cannot_take_back_is_not_given_again_what_it_has():
    service = Service()
    feed = LoggerFeed(service)
    give(feed, 1, 2, 3)
    feed.redo_from(1)
    give(feed, 2, 3)
    feed.give({"val_loss": 1.0, "loss": 3.0}, 3, 0, 7.0)  # had not come to it before the failure
    give(feed, 4)
    assert [step for step, _ in service.rows] == [1, 2, 3, 3, 4]
    assert service.rows[3] == (3, {"val_loss": 1.0, "epoch": 0.0})
    feed.redo_from(0)
    give(feed, 1, 2, 3, 4, 5)
    assert [step for step, _ in service.rows] == [1, 2, 3, 3, 4, 5]


def test_one_that_takes_back_gets_all_again_and_the_time():
    own = Own()
    feed = LoggerFeed(own)
    give(feed, 1, 2, 3)
    feed.redo_from(1)
    give(feed, 2, 3)
    assert own.rows == [(1, 7.0), (2, 7.0), (3, 7.0)]


def test_the_end_of_an_epoch_that_comes_again_is_written_once():
    rows = EpochRows()

    def take(step: int) -> dict[str, float]:
        values = {"val_loss": 1.0, "hidden": 2.0}
        return rows.take(EpochMetrics("validate", 0, step, 0.0, values, frozenset({"val_loss"}), frozenset()))

    assert take(6) == take(6) == {"val_loss": 1.0}  # of two validations
    rows.begin_generation()
    assert take(6) == {}
    assert take(12) == {"val_loss": 1.0}
    rows.redo_from(6)
    rows.begin_generation()
    assert take(6) == {}
    assert take(12) == {"val_loss": 1.0}
