from __future__ import annotations

import errno
import logging
import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from raylight.contract.errors import MissingFile, StorageError
from raylight.storage.filesystem import Storage
from raylight.storage.retry import Backoff, is_worth_retrying, retry
from tests.faults_storage import CREDENTIALS, Fault, FaultProxy

MB = 1 << 20
LARGE = bytes(range(256)) * (22 * MB // 256)
OPERATIONS: dict[str, Callable[[Storage], object]] = {
    "write": lambda storage: storage.write("new", [b"content"]).size,
    "read": lambda storage: storage.read_bytes("old"),
    "list": lambda storage: [entry.name for entry in storage.list("folder")],
    "info": lambda storage: storage.info("old").size,
    "delete": lambda storage: (storage.delete("folder/one"), storage.exists("folder/one"))[1],
    "delete folder": lambda storage: (storage.delete_own("folder", lambda name: True), storage.list("folder"))[1],
    "create": lambda storage: storage.create_exclusive("lock", b"mine"),
}


def fill(storage: Storage) -> None:
    storage.write("old", [b"old content"])
    storage.write("folder/one", [b"1"])
    storage.write("folder/two", [b"2"])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What each operation gives where nothing fails: on a folder."""
    results = {}
    for name, operation in OPERATIONS.items():
        storage = Storage(tmp_path_factory.mktemp("expected"))
        fill(storage)
        results[name] = operation(storage)
    return results


@pytest.mark.parametrize("kind", ["500", "503", "reset", "unanswered"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_survive_faults(
    behind_proxy: Storage, proxy: FaultProxy, caplog: pytest.LogCaptureFixture, expected: dict, name: str, kind: str
) -> None:
    fill(behind_proxy)
    proxy.inject(Fault(kind, first=1, count=2), Fault(kind, first=4, count=1))
    with caplog.at_level(logging.WARNING, "raylight.storage"):
        result = OPERATIONS[name](behind_proxy)
    assert result == expected[name]
    tries = [record.getMessage() for record in caplog.records]
    assert tries, "the log names no reason"
    assert all("AWS Error" in text for text in tries)
    assert len(tries) <= 3, "one line an outage"


@pytest.mark.parametrize("kind", ["500", "503", "reset", "dropped", "unanswered"])
def test_a_large_write_survives_faults(behind_proxy: Storage, proxy: FaultProxy, kind: str) -> None:
    behind_proxy.exists("warm")
    proxy.inject(Fault(kind, first=2, count=1, method="PUT"), Fault(kind, method="POST", path="uploadId="))
    saved = behind_proxy.write("large", iter([LARGE[: 5 * MB], LARGE[5 * MB :]]))
    assert saved.size == len(LARGE)
    assert behind_proxy.read_bytes("large") == LARGE


def test_a_truncated_answer_is_read_again(behind_proxy: Storage, proxy: FaultProxy) -> None:
    behind_proxy.write("large", [LARGE])
    proxy.inject(Fault("truncated", method="GET", count=2))
    assert behind_proxy.read_bytes("large") == LARGE


def test_a_dropped_upload_is_sent_again(behind_proxy: Storage, proxy: FaultProxy) -> None:
    proxy.inject(Fault("dropped", method="PUT", count=2))
    behind_proxy.write("file", [LARGE[:MB]])
    assert behind_proxy.read_bytes("file") == LARGE[:MB]


def test_a_stall_of_half_a_minute_is_not_waited_for(behind_proxy: Storage, proxy: FaultProxy) -> None:
    proxy.inject(Fault("stall", method="PUT", stall_s=30.0))
    started = time.monotonic()
    behind_proxy.write("file", [b"content"])
    assert time.monotonic() - started < 20.0
    assert behind_proxy.read_bytes("file") == b"content"


def test_a_broken_stream_is_sent_again_from_what_can_be_read_again(
    proxy: FaultProxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    once = S3FileSystem(
        endpoint_override=f"127.0.0.1:{proxy.port}", scheme="http", region="us-east-1",
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),
    )  # fmt: skip
    storage = Storage(f"runs/{uuid.uuid4().hex}", once)
    proxy.inject(Fault("500", method="PUT", path="partNumber=2"))
    storage.write("large", [LARGE])
    assert storage.read_bytes("large") == LARGE
    assert "Sending it again from the start" in caplog.text

    proxy.inject(Fault("500", method="PUT", path="partNumber=2"))
    with pytest.raises(StorageError, match=r"could not write s3://.*broken"):
        storage.write("broken", iter([LARGE]))
    assert not storage.exists("broken")


def test_tries_are_bounded_and_counted(behind_proxy: Storage, proxy: FaultProxy) -> None:
    proxy.inject(Fault("503", count=1000))
    with pytest.raises(StorageError, match=r"(?s)write s3://runs/.*/file: .*SLOW_DOWN.*\(6 tries in") as caught:
        behind_proxy.write("file", [b"content"])
    assert len(proxy.requests) == 6 + 1  # and one that asks whether anything answers
    assert "Check that the storage is there" in str(caught.value)
    proxy.inject()
    assert not behind_proxy.exists("file")


def test_an_outage_is_waited_for_once_and_told_once(proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    """By all storages that are made from one, in all threads."""
    storage = Storage(proxy.uri(uuid.uuid4().hex), backoff=Backoff(num_attempts=5, first_s=0.2, longest_s=0.5))
    storage.write("file", [b"content"])
    proxy.inject(Fault("reset", count=1 << 30))
    operations = list(OPERATIONS.values()) * 3

    def fail(operation: Callable[[Storage], object]) -> None:
        with pytest.raises(StorageError, match="NETWORK_CONNECTION"):
            operation(storage.child("deeper"))

    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fail, operations))
    assert time.monotonic() - started < 1.6 + 2.0
    assert len(proxy.requests) < 5 * 4 + len(operations)
    assert len([text for text in caplog.messages if "it is tried again for up to 2 s" in text]) == 1
    assert len(caplog.messages) <= 2

    proxy.inject()
    time.sleep(0.5)
    assert storage.read_bytes("file") == b"content"
    fill(storage)
    assert OPERATIONS["read"](storage) == b"old content"


def test_a_file_that_cannot_be_written_is_no_outage(behind_proxy: Storage, proxy: FaultProxy) -> None:
    proxy.inject(Fault("reset", method="PUT", path="bad", count=1 << 30))
    with pytest.raises(StorageError, match="6 tries in"):
        behind_proxy.write("bad", [b"content"])
    behind_proxy.write("good", [b"content"])
    assert behind_proxy.read_bytes("good") == b"content"


def test_what_cannot_succeed_is_not_tried_again(behind_proxy: Storage, proxy: FaultProxy) -> None:
    proxy.inject(Fault("403", count=1000))
    with pytest.raises(StorageError, match=r"(?s)ACCESS_DENIED.*Check the credentials"):
        behind_proxy.write("file", [b"content"])
    assert len(proxy.requests) == 1


def test_a_server_that_is_gone_is_told(proxy: FaultProxy) -> None:
    storage = Storage(proxy.uri("x"), backoff=Backoff(num_attempts=3, first_s=0.01))
    proxy.close()
    with pytest.raises(StorageError, match=r"(?s)NETWORK_CONNECTION.*3 tries.*endpoint_override"):
        storage.write("file", [b"content"])


def test_waits_grow_are_bounded_and_differ() -> None:
    backoff = Backoff()
    for failures in range(1, backoff.num_attempts):
        delays = [backoff.delay_s(failures) for _ in range(50)]
        longest = min(backoff.longest_s, backoff.first_s * 2 ** (failures - 1))
        assert all(longest / 2 <= delay <= longest for delay in delays)
        assert len(set(delays)) > 40
    whole = sum(min(backoff.longest_s, backoff.first_s * 2**failures) for failures in range(backoff.num_attempts - 1))
    assert 30.0 < whole < 60.0  # rides out an outage of half a minute, even at the shortest waits not much less


def test_which_errors_are_final() -> None:
    assert is_worth_retrying(OSError("AWS Error SLOW_DOWN during PutObject"))
    assert is_worth_retrying(ConnectionResetError(errno.ECONNRESET, "reset"))
    assert not is_worth_retrying(FileNotFoundError("x"))
    assert not is_worth_retrying(OSError(errno.ENOSPC, "full"))
    assert not is_worth_retrying(OSError("AWS Error NO_SUCH_BUCKET during PutObject"))


def test_retry_gives_back_and_gives_up() -> None:
    failures = [OSError("first"), OSError("second")]

    def operation() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert retry(operation, Backoff(first_s=0.001), "read", "x") == "done"
    failures = [OSError(f"number {number}") for number in range(10)]
    with pytest.raises(StorageError, match=re.escape("could not read x: number 7 (3 tries in 0 s).")):
        retry(operation, Backoff(num_attempts=3, first_s=0.001), "read", "x")
    failures = [FileNotFoundError("x")]
    with pytest.raises(MissingFile):
        retry(operation, Backoff(first_s=0.001), "read", "x")
