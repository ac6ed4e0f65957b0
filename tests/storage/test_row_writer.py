"""Rows are written in order, once, by a thread that outlives failures."""

from __future__ import annotations

import logging
import threading

import pytest

from raylight.storage.row_writer import RowWriter


class Sink:
    def __init__(self) -> None:
        self.taken: list[int] = []
        self.stored: list[int] = []
        self.take_error: Exception | None = None
        self.store_error: Exception | None = None
        self.tried = threading.Semaphore(0)
        self.threads: set[str] = set()

    def take(self, rows: list[int]) -> None:
        if self.take_error is not None:
            self.tried.release()
            raise self.take_error
        self.taken += rows

    def store(self) -> None:
        self.threads.add(threading.current_thread().name)
        if self.store_error is not None:
            self.tried.release()
            raise self.store_error
        self.stored = list(self.taken)
        self.tried.release()

    def writer(self, interval_s: float = 3600.0) -> RowWriter[int]:
        return RowWriter("rows", self.take, self.store, interval_s)

    def wait(self, tries: int) -> None:
        for _ in range(tries):
            assert self.tried.acquire(timeout=30)


def test_flush_writes_in_the_calling_thread_and_close_writes_the_rest():
    sink = Sink()
    writer = sink.writer()
    for row in range(5):
        writer.add(row)
    assert sink.stored == []
    writer.flush()
    assert sink.stored == [0, 1, 2, 3, 4]
    writer.add(5)
    writer.close()
    assert sink.stored == [0, 1, 2, 3, 4, 5]
    assert sink.threads == {threading.current_thread().name}


def test_the_thread_writes_by_itself_and_ends():
    sink = Sink()
    writer = sink.writer(interval_s=0.01)
    writer.add(1)
    while not sink.stored:
        sink.wait(1)
    writer.close()
    assert sink.stored == [1]
    assert not any(thread.name == "raylight-rows" for thread in threading.enumerate())


def test_no_row_starts_no_thread():
    before = threading.active_count()
    writer = Sink().writer()
    assert threading.active_count() == before
    writer.close()


def test_rows_that_could_not_be_taken_are_offered_again_in_order(caplog):
    sink = Sink()
    sink.take_error = OSError("disk full")
    writer = sink.writer(interval_s=0.01)
    with caplog.at_level(logging.WARNING, "raylight"):
        writer.add(1)
        writer.add(2)
        sink.wait(5)
    writer.add(3)
    sink.take_error = None
    writer.flush()
    writer.close()
    assert sink.stored == [1, 2, 3]
    assert [record.message for record in caplog.records] == ["cannot write rows, will try again: OSError: disk full"]


def test_storing_is_tried_again_without_new_rows():
    sink = Sink()
    sink.store_error = OSError("storage is away")
    writer = sink.writer(interval_s=0.01)
    writer.add(1)
    sink.wait(3)
    sink.store_error = None
    while not sink.stored:
        sink.wait(1)
    writer.close()
    assert sink.taken == sink.stored == [1]


def test_flush_and_close_raise_what_went_wrong():
    sink = Sink()
    writer = sink.writer()
    writer.add(1)
    sink.store_error = OSError("storage is away")
    with pytest.raises(OSError, match="away"):
        writer.flush()
    with pytest.raises(OSError, match="away"):
        writer.close()
    sink.store_error = None
    writer.close()
    assert sink.stored == [1]


def test_no_row_is_lost_or_doubled_while_others_add():
    sink = Sink()
    writer = sink.writer(interval_s=0.001)

    def add(first: int) -> None:
        for row in range(first, first + 5000):
            writer.add(row)

    threads = [threading.Thread(target=add, args=(first,)) for first in (0, 10_000, 20_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert sorted(sink.stored) == [row for first in (0, 10_000, 20_000) for row in range(first, first + 5000)]
    assert [row for row in sink.stored if row < 10_000] == list(range(5000))
