"""Every value is in the table once, whatever happens between two writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylight.contract.errors import StorageError
from raylight.driver import journal as journal_module
from raylight.driver.journal import Journal, merge_metrics, read_metrics
from raylight.storage.filesystem import Storage
from raylight.storage.retry import Backoff
from tests.faults_storage import Fault


@pytest.fixture
def files(tmp_path) -> Storage:
    return Storage(tmp_path / "version_0")


def names(files: Storage) -> list[str]:
    return [entry.name for entry in files.list()]


def values(files: Storage, name: str = "loss") -> list[tuple[int, float]]:
    return [(row["step"], row["value"]) for row in read_metrics(files).to_pylist() if row["name"] == name]


def add(journal: Journal, *steps: int, loss: float | None = None) -> None:
    for step in steps:
        journal.add(step, step // 10, {"loss": float(step) if loss is None else loss}, 1.7e9 + step)


def abandon(journal: Journal) -> None:
    """As if its process had died: its thread does nothing more."""
    journal._writer._closing.set()


def test_columns_and_types(files):
    journal = Journal(files)
    journal.add(5, 1, {"loss": 0.5, "größe": float("nan")}, 1.7e9 + 0.123456)
    journal.close()
    table = read_metrics(files)
    assert table.schema.equals(
        pa.schema(
            [("step", pa.int64()), ("epoch", pa.int64()), ("name", pa.dictionary(pa.int32(), pa.string())),
             ("value", pa.float64()), ("time", pa.timestamp("us", tz="UTC"))]
        )
    )  # fmt: skip
    assert table["name"].to_pylist() == ["loss", "größe"]
    assert table["step"].to_pylist() == [5, 5]
    assert table["epoch"].to_pylist() == [1, 1]
    assert table["time"][0].as_py().timestamp() == pytest.approx(1.7e9 + 0.123456, abs=1e-6)
    plain = pq.read_table(files.local_path("metrics.parquet"))  # the file is for other programs too
    assert plain["value"].to_pylist()[0] == 0.5


def test_parts_while_it_runs_and_one_file_after(files):
    journal = Journal(files)
    add(journal, 1, 2)
    assert names(files) == []
    journal.flush()
    assert names(files) == ["metrics-00000.parquet"]
    assert values(files) == [(1, 1.0), (2, 2.0)]
    add(journal, 3)
    journal.flush()
    assert values(files) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    journal.close()
    assert names(files) == ["metrics.parquet"]
    assert values(files) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_part_that_is_full_is_followed_by_another(files, monkeypatch):
    monkeypatch.setattr(journal_module, "ROWS_PER_PART", 10)
    journal = Journal(files)
    for start in range(0, 35, 5):
        add(journal, *range(start, start + 5))
        journal.flush()
    assert names(files) == [f"metrics-{number:05d}.parquet" for number in range(4)]
    assert [step for step, _ in values(files)] == list(range(35))
    journal.close()
    assert names(files) == ["metrics.parquet"]
    assert [step for step, _ in values(files)] == list(range(35))


def test_nothing_logged_writes_nothing(files):
    Journal(files).close()
    assert names(files) == []
    assert read_metrics(files).num_rows == 0
    assert read_metrics(files).schema.names == ["step", "epoch", "name", "value", "time"]


def test_a_reopened_version_goes_on(files):
    for start in (0, 10, 20):
        journal = Journal(files)
        add(journal, *range(start, start + 10))
        journal.close()
    assert [step for step, _ in values(files)] == list(range(30))
    assert names(files) == ["metrics.parquet"]


def test_a_reopened_version_whose_driver_died_goes_on(files):
    dead = Journal(files)
    add(dead, 1, 2)
    dead.flush()
    abandon(dead)
    journal = Journal(files)
    add(journal, 3)
    journal.flush()
    assert names(files) == ["metrics-00000.parquet", "metrics-00001.parquet"]
    journal.close()
    assert values(files) == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("flush_before", [True, False])
@pytest.mark.parametrize("flush_after", [True, False])
def test_steps_that_are_redone_are_there_once(files, flush_before, flush_after):
    journal = Journal(files)
    add(journal, 1, 2, 3, 4)
    if flush_before:
        journal.flush()
    journal.drop_after(2)
    if flush_after:
        journal.flush()
        assert values(files) == [(1, 1.0), (2, 2.0)]
    add(journal, 3, loss=30.0)
    journal.flush()
    assert values(files) == [(1, 1.0), (2, 2.0), (3, 30.0)]
    journal.close()
    assert values(files) == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_steps_are_redone_across_parts_and_more_than_once(files, monkeypatch):
    monkeypatch.setattr(journal_module, "ROWS_PER_PART", 4)
    journal = Journal(files)
    expected: dict[int, float] = {}
    for start, end, back in [(0, 9, 5), (6, 12, 11), (12, 14, 3), (4, 20, 19)]:
        add(journal, *range(start, end + 1), loss=start + 0.5)
        expected |= dict.fromkeys(range(start, end + 1), start + 0.5)
        journal.flush()
        journal.drop_after(back)
        expected = {step: value for step, value in expected.items() if step <= back}
    add(journal, 20, loss=99.0)
    journal.flush()
    assert values(files) == sorted({**expected, 20: 99.0}.items())
    journal.close()
    assert values(files) == sorted({**expected, 20: 99.0}.items())
    again = Journal(files)
    again.drop_after(10)
    again.close()
    assert [step for step, _ in values(files)] == list(range(11))


def test_a_resumed_version_takes_back_what_the_last_one_did_beyond_its_checkpoint(files):
    first = Journal(files)
    add(first, *range(10))
    first.close()
    second = Journal(files)
    second.drop_after(4)
    assert len(values(files)) == 10  # nothing is lost before there is something in its place
    add(second, 5, 6, loss=50.0)
    second.flush()
    assert values(files) == [*((step, float(step)) for step in range(5)), (5, 50.0), (6, 50.0)]
    second.close()
    assert values(files) == [*((step, float(step)) for step in range(5)), (5, 50.0), (6, 50.0)]


class Crash(BaseException):
    """The process ends here."""


class CrashingFiles:
    """Storage whose operation number `crash_at` is not done, nor anything after it."""

    def __init__(self, files: Storage, crash_at: int):
        self._files, self._left = files, crash_at

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Crash

    def write(self, path: str, chunks):
        self._count()
        return self._files.write(path, chunks)

    def delete(self, path: str) -> None:
        self._count()
        self._files.delete(path)

    def __getattr__(self, name: str):
        return getattr(self._files, name)


def write_all(journal: Journal) -> None:
    for start in range(0, 30, 5):
        add(journal, *range(start, start + 5))
        journal.flush()
    journal.drop_after(22)
    add(journal, *range(23, 30), loss=100.0)
    journal.close()


def test_a_crash_at_any_write_or_delete_loses_nothing_that_was_written_and_doubles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "ROWS_PER_PART", 10)
    final = [*((step, float(step)) for step in range(23)), *((step, 100.0) for step in range(23, 30))]
    num_crashes = 0
    for crash_at in range(100):
        files = Storage(tmp_path / f"version_{crash_at}")
        journal = Journal(CrashingFiles(files, crash_at))
        try:
            write_all(journal)
        except Crash:
            num_crashes += 1
            abandon(journal)
        found = values(files)
        steps = [step for step, _ in found]
        assert steps == sorted(set(steps)), crash_at
        assert len(steps) >= min(5 * crash_at, 23), crash_at
        again = Journal(files)
        last = max(steps, default=-1)
        kept = min(last, 22)
        again.drop_after(kept)
        add(again, *range(kept + 1, 23))
        add(again, *range(23, 30), loss=100.0)
        again.close()
        assert values(files) == final, crash_at
        assert names(files) == ["metrics.parquet"], crash_at
        if num_crashes < crash_at + 1:
            break
    assert num_crashes >= 10


def test_rows_reach_storage_by_themselves_before_a_kill(tmp_path):
    """The thread writes without any call; a driver that is killed has lost only what came after."""
    root = tmp_path / "version_0"
    code = f"""
import os, signal, sys, time
from raylight.driver import journal as module
from raylight.storage.filesystem import Storage
module.WRITE_INTERVAL_S = 0.05
files = Storage({str(root)!r})
journal = module.Journal(files)
for step in range(1000):
    journal.add(step, 0, {{"loss": 1.0}}, 0.0)
while module.read_metrics(files).num_rows < 1000:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL
    assert read_metrics(Storage(root)).num_rows == 1000
    merge_metrics(Storage(root))
    assert os.listdir(root) == ["metrics.parquet"]
    assert read_metrics(Storage(root)).num_rows == 1000


def test_a_reader_while_the_run_ends_gets_all_rows(files):
    """The reader lists the parts, then they are merged, then it opens them."""
    journal = Journal(files)
    add(journal, *range(10))
    journal.flush()

    class EndsAfterListing:
        def __getattr__(self, name: str):
            return getattr(files, name)

        def list(self, path: str):
            found = files.list(path)
            merge_metrics(files)
            return found

    assert read_metrics(EndsAfterListing()).num_rows == 10
    assert names(files) == ["metrics.parquet"]


def test_importing_it_loads_no_pyarrow():
    code = (
        "import sys, raylight.driver.journal as j; from raylight.storage.filesystem import Storage;"
        "j.Journal(Storage('nowhere')).close(); assert not {'pyarrow', 'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_on_s3_rows_are_kept_while_storage_is_away(proxy):
    files = Storage(proxy.uri(uuid.uuid4().hex), backoff=Backoff(num_attempts=2, first_s=0.01))
    journal = Journal(files)
    add(journal, 1)
    journal.flush()
    proxy.faults.append(Fault("503", count=10_000, method="PUT"))
    add(journal, 2)
    with pytest.raises(StorageError):
        journal.flush()
    add(journal, 3)
    with pytest.raises(StorageError):
        journal.close()
    assert values(files) == [(1, 1.0)]
    proxy.faults.clear()
    journal.close()
    assert values(files) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert names(files) == ["metrics.parquet"]
