"""A process that saves is killed at every single effect it has on storage; what it leaves must be whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raylight.storage import checkpoints as store
from raylight.storage import local_files
from raylight.storage.filesystem import Storage
from raylight.storage.local_files import LocalSink
from tests.faults_storage import FaultProxy, uri_at
from tests.storage import crash_sequence

ROOT = Path(__file__).parents[2]
S3_SIZE = 400_000


class Forker:
    """Runs the sequence in child processes."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "tests.storage.crash_sequence", *arguments]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = 0
        self.pid_known = threading.Event()

    def run(self, kill_at: int, uri: str, size: int = 1000) -> tuple[int, int]:
        """The last step that the child reported as committed (0: none), and the signal that ended it (0: none)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.pid_known.clear()
        self._process.stdin.write(f"{kill_at} {size} {uri}\n")
        self._process.stdin.flush()
        reported = 0
        for line in self._process.stdout:
            word, number = line.split()
            if word == "started":
                self.pid = int(number)
                self.pid_known.set()
            elif word == "committed":
                reported = int(number)
            else:
                return reported, int(number)
        raise AssertionError(f"the forking process ended with {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0


@contextmanager
def forking(*arguments: str) -> Iterator[Forker]:
    forker = Forker(*arguments)
    yield forker
    forker.close()


def kill_at_effects(folder: Path, stride: int, size: int = 1000) -> int:
    """Kills a child at every `stride`-th effect, and returns how many effects there are."""
    point, ended_by, reports = 1, signal.SIGKILL, set()
    with forking() as forker:
        while ended_by == signal.SIGKILL:
            path = folder / str(point)
            reported, ended_by = forker.run(point, str(path), size)
            crash_sequence.check(str(path), reported, size)
            shutil.rmtree(path, ignore_errors=True)
            reports.add(reported)
            point += stride
    assert ended_by == 0
    assert reports == {0, *crash_sequence.LOSSES}
    return point - stride


def test_killed_at_effects_on_a_local_disk(memory_path: Path) -> None:
    assert kill_at_effects(memory_path, stride=3) > 300


@pytest.mark.soak
def test_killed_at_every_effect_on_a_local_disk(memory_path: Path) -> None:
    assert kill_at_effects(memory_path, stride=1) > 300


DIRECT_SIZE = 2 * local_files._MIN_DIRECT_BYTES


def test_killed_at_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files whose bytes the disk fetches by itself, on a real disk: also killed when half of a piece is there."""
    assert kill_at_effects(tmp_path, stride=41, size=DIRECT_SIZE) > 300
    direct, write = [], LocalSink._write_direct
    monkeypatch.setattr(LocalSink, "_write_direct", lambda *its: direct.append(write(*its)) or direct[-1])
    crash_sequence.save(Storage(tmp_path / "after"), 10, 0, DIRECT_SIZE)
    if sum(direct) == 0:
        pytest.skip("this file system makes no direct writes")
    assert sum(direct) == 2 * crash_sequence.WORLD_SIZE * DIRECT_SIZE


@pytest.mark.soak
def test_killed_at_every_direct_write(tmp_path: Path) -> None:
    assert kill_at_effects(tmp_path, stride=1, size=DIRECT_SIZE) > 300


def kill_at_request(proxy: FaultProxy, forker: Forker, port: int, position: int, done: bool) -> int:
    """Kills the child when it has made its request number `position`: before the server does it, or after. Returns the
    signal that ended the child."""

    def kill(number: int) -> bool:
        if number == position:
            forker.pid_known.wait()
            os.kill(forker.pid, signal.SIGKILL)
        return number == position

    prefix = f"kill-{position}-{done}"
    proxy.before, proxy.after = (None, kill) if done else (kill, None)
    proxy.inject()
    reported, ended_by = forker.run(0, proxy.uri(prefix), S3_SIZE)
    proxy.before = proxy.after = None
    crash_sequence.check(uri_at(port, prefix), reported, S3_SIZE)
    return ended_by


def test_killed_at_requests_to_s3(s3_port: int, proxy: FaultProxy) -> None:
    """A sample of all requests, half of them done by the server and never answered."""
    with forking("s3") as forker:
        assert forker.run(0, proxy.uri("undisturbed"), S3_SIZE) == (50, 0)
        num_requests = len(proxy.requests)
        assert num_requests > 100
        for position in random.Random(0).sample(range(1, num_requests), 5):
            assert kill_at_request(proxy, forker, s3_port, position, done=position % 2 == 0) == signal.SIGKILL


@pytest.mark.soak
def test_killed_at_every_request_to_s3(s3_port: int, proxy: FaultProxy) -> None:
    with forking("s3") as forker:
        position, ended_by = 0, signal.SIGKILL
        while ended_by == signal.SIGKILL:
            position += 1
            for done in (False, True):
                ended_by = kill_at_request(proxy, forker, s3_port, position, done)
    assert position > 100


def test_a_stale_process_that_wakes_up_changes_nothing(tmp_path: Path) -> None:
    """Stopped in the middle of a save, thought dead, replaced, and woken up again."""
    uri = str(tmp_path)
    script = (
        "import os, signal, sys\nfrom tests.storage import crash_sequence as sequence\n"
        "from raylight.storage import checkpoints as store\nfrom raylight.storage.filesystem import Storage\n"
        "version = Storage(sys.argv[1])\nsequence.save(version, 10, 0, 1000)\n"
        "arrived = store._check_arrived\n"
        "def stop(*arguments):\n    arrived(*arguments)\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "store._check_arrived = stop\n"
        "sequence.save(version, 20, 0, 1000)\n"
    )
    command = [sys.executable, "-c", script, uri]
    stale = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    os.waitpid(stale.pid, os.WUNTRACED)
    version = Storage(uri)
    store.raise_fence(version, 1)
    crash_sequence.save(version, 20, 1, 1000)
    os.kill(stale.pid, signal.SIGCONT)
    assert "attempt 1 has taken over" in stale.communicate(timeout=30)[1]
    assert [it.name for it in store.list_checkpoints(version)] == ["step-00000010", "step-00000020-attempt-1"]
    assert all(store.verify(it) == [] for it in store.list_checkpoints(version))
