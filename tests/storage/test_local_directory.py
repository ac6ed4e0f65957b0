"""Files that grow reach storage whole, whether it is on this machine or not."""

from __future__ import annotations

import os
import time

import pytest

from raylight.contract.errors import StorageError
from raylight.storage import local_directory
from raylight.storage.filesystem import Storage
from raylight.storage.local_directory import LocalDirectory
from raylight.storage.retry import Backoff
from tests.faults_storage import Fault


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(local_directory, "MIN_COPY_INTERVAL_S", 0.0)
    monkeypatch.setattr(local_directory, "MAX_COPY_SHARE", 1e9)


def append(directory: LocalDirectory, name: str, data: bytes) -> None:
    with open(os.path.join(directory.path, name), "ab") as file:
        file.write(data)


def test_local_storage_is_used_as_it_is(tmp_path):
    files = Storage(tmp_path / "version_0")
    directory = LocalDirectory(files)
    append(directory, "events", b"abc")
    assert directory.path == str(tmp_path / "version_0")
    assert files.read_bytes("events") == b"abc"
    directory.copy()
    directory.close()
    assert files.read_bytes("events") == b"abc"


def test_a_growing_file_is_copied_to_s3_and_the_copy_here_removed(s3_uri, at_once):
    files = Storage(s3_uri)
    directory = LocalDirectory(files)
    append(directory, "events", b"abc")
    directory.copy()
    assert files.read_bytes("events") == b"abc"
    append(directory, "events", b"def" * 1_000_000)
    append(directory, "other", b"")
    local = directory.path
    directory.close()
    assert files.read_bytes("events") == b"abc" + b"def" * 1_000_000
    assert files.read_bytes("other") == b""
    assert not os.path.exists(local)


def test_what_has_not_changed_is_not_sent_again(proxy, behind_proxy, at_once):
    directory = LocalDirectory(behind_proxy)
    append(directory, "a", b"1")
    append(directory, "b", b"2")
    directory.copy()
    append(directory, "b", b"3")
    directory.copy()
    directory.close()
    puts = [path.rpartition("/")[2].partition("?")[0] for method, path in proxy.requests if method == "PUT"]
    assert sorted(puts) == ["a", "b", "b"]


def test_copying_waits_its_turn(s3_uri):
    files = Storage(s3_uri)
    directory = LocalDirectory(files)
    append(directory, "events", b"abc")
    directory.copy()
    assert files.list() == []  # the first copy is due after MIN_COPY_INTERVAL_S
    directory.close()
    assert files.read_bytes("events") == b"abc"


def test_slow_copies_become_rare(s3_uri, monkeypatch):
    monkeypatch.setattr(local_directory, "MIN_COPY_INTERVAL_S", 0.0)
    directory = LocalDirectory(Storage(s3_uri))
    append(directory, "events", b"abc")
    before = time.monotonic()
    directory.copy()
    took = time.monotonic() - before
    assert directory._next_copy - time.monotonic() == pytest.approx(took / 0.1, rel=0.5)
    directory.close()


def test_an_earlier_file_goes_on(s3_uri):
    files = Storage(s3_uri)
    files.write("metrics.csv", [b"step\n1\n"])
    directory = LocalDirectory(files)
    assert directory.fetch("metrics.csv") == os.path.join(directory.path, "metrics.csv")
    append(directory, "metrics.csv", b"2\n")
    directory.close()
    assert files.read_bytes("metrics.csv") == b"step\n1\n2\n"
    fresh = LocalDirectory(files)
    assert not os.path.exists(fresh.fetch("missing"))
    fresh.close()


def test_when_storage_stays_away_the_files_are_kept_here(proxy, at_once):
    proxy.faults.append(Fault("500", count=1000, method="PUT"))
    directory = LocalDirectory(Storage(proxy.uri("kept"), backoff=Backoff(num_attempts=2, first_s=0.01)))
    append(directory, "events", b"abc")
    local = directory.path
    with pytest.raises(StorageError, match=f"kept in {local}"):
        directory.close()
    assert os.listdir(local) == ["events"]
    proxy.faults.clear()
    directory.close()
    assert not os.path.exists(local)
