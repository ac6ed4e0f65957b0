from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from pyarrow import fs

from raylight.contract.errors import StorageError
from raylight.launch.worker_logs import WorkerLog
from raylight.storage.filesystem import Storage


@pytest.fixture
def memory_storage():
    filesystem = fs._MockFileSystem()
    filesystem.create_dir("bucket")
    return Storage("bucket", filesystem)


PRINT_IN_EVERY_WAY = """
print("from print")
print("from stderr", file=sys.stderr)
ctypes.CDLL(None).puts(b"from C")
subprocess.run(["echo", "from a child"], check=True)
os.write(1, b"from the descriptor\\n")
"""
WAYS = ("from print", "from stderr", "from C", "from a child", "from the descriptor")


def run_script(text: str, *arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: pytest has put its own objects in the place of this one's sys.stdout."""
    text = (
        "import ctypes, os, subprocess, sys\n"
        "from raylight.launch.worker_logs import WorkerLog\n"
        "from raylight.storage.filesystem import Storage\n" + text
    )
    return subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, check=False)


def test_all_that_is_printed_is_in_the_log_and_nowhere_else(tmp_path):
    done = run_script(
        "print('before')\n"
        "log = WorkerLog(Storage(sys.argv[1]), rank=3)\n" + PRINT_IN_EVERY_WAY + "log.flush()\n"
        "text = log.read()\n"
        "assert log.close() is None\n"
        "print(text)\n",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    on_disk = (tmp_path / "logs" / "rank-3.log").read_text()
    assert sorted(on_disk.splitlines()) == sorted(WAYS)
    assert done.stdout == f"before\n{on_disk}\n"
    assert done.stderr == ""


def test_each_piece_of_text_is_read_once(tmp_path):
    log = WorkerLog(Storage(tmp_path), rank=0)
    os.write(1, b"first ")
    assert log.read() == "first "
    assert log.read() == ""
    os.write(1, "é".encode()[:1])
    assert log.read() == ""
    os.write(1, "é".encode()[1:] + b"\xff")
    assert log.read() == "é\ufffd"
    log.close()
    assert log.read() == ""


def test_follow_gives_text_while_the_worker_is_busy(tmp_path):
    log = WorkerLog(Storage(tmp_path), rank=0)
    arrived, parts = threading.Event(), []

    def listen() -> None:
        for text in log.follow(every_s=0.01):
            parts.append(text)
            arrived.set()

    listener = threading.Thread(target=listen)
    listener.start()
    os.write(1, b"one")
    assert arrived.wait(10)
    os.write(1, b", two")
    log.close()
    listener.join(10)
    assert not listener.is_alive()
    assert "".join(parts) == "one, two"
    assert list(log.follow(every_s=10)) == []


def test_a_log_is_continued(tmp_path):
    for word in ("one", "two"):
        log = WorkerLog(Storage(tmp_path), rank=0)
        os.write(1, word.encode())
        assert log.read() == word
        log.close()
    assert (tmp_path / "logs" / "rank-0.log").read_text() == "onetwo"


def test_last_words_of_a_killed_process_are_in_the_log(tmp_path):
    done = run_script(
        "log = WorkerLog(Storage(sys.argv[1]), rank=0)\nos.write(2, b'last words')\nos.kill(os.getpid(), 9)\n",
        str(tmp_path),
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == ""
    assert (tmp_path / "logs" / "rank-0.log").read_text() == "last words"


def test_remote_storage_gets_the_log_while_it_grows_and_at_the_end(memory_storage):
    log = WorkerLog(memory_storage, rank=1, upload_every_s=0.01)
    os.write(1, b"early ")
    deadline = time.monotonic() + 20
    while not (memory_storage.exists("logs/rank-1.log") and memory_storage.read_bytes("logs/rank-1.log")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.write(1, b"late")
    assert log.close() is None
    assert memory_storage.read_bytes("logs/rank-1.log") == b"early late"

    log = WorkerLog(memory_storage, rank=1)
    os.write(1, b", next attempt")
    assert log.read() == ", next attempt"
    log.close()
    assert memory_storage.read_bytes("logs/rank-1.log") == b"early late, next attempt"


class FullStorage:
    """What a storage does whose disk is full."""

    def local_path(self, path: str) -> None:
        return None

    def open_read(self, path: str):
        raise FileNotFoundError(path)

    def write(self, path: str, chunks) -> None:
        raise StorageError("no space left")


def test_a_log_that_cannot_be_stored_says_why_and_harms_nobody():
    log = WorkerLog(FullStorage(), rank=0)
    os.write(1, b"text")
    assert log.read() == "text"
    assert log.close() == "no space left"


def test_without_storage_text_can_still_be_read():
    done = run_script(
        "log = WorkerLog(None, rank=0)\n" + PRINT_IN_EVERY_WAY + "log.flush()\ntext = log.read()\nlog.close()\n"
        "print(sorted(text.splitlines()))\n"
    )
    assert done.stdout == f"{sorted(WAYS)}\n", done.stderr
