from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylight.contract.errors import StorageError
from raylight.storage import checkpoints as store
from raylight.storage.filesystem import Storage
from tests.storage import crash_sequence

SIZE = 100_000
DISK_SIZE = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_costs_no_earlier_checkpoint(small_disk: Path) -> None:
    version = Storage(small_disk)
    crash_sequence.save(version, 10, 0, SIZE)
    with pytest.raises(StorageError, match=r"(?s)No space left on device.*Free some space") as caught:
        crash_sequence.save(version, 20, 0, SIZE)
    assert "step-00000020" in str(caught.value)
    assert [it.step for it in store.list_checkpoints(version)] == [10]
    assert store.newest_whole(version).step == 10

    partial = [name for _, _, names in os.walk(small_disk) for name in names if name.endswith(".partial")]
    assert partial == [], "a failed write must not keep the space it took"
    assert store.sweep_leftovers(version) == ["step-00000020"]
    store.delete(store.list_checkpoints(version)[0])
    crash_sequence.save(version, 30, 0, SIZE)
    assert store.newest_whole(version).step == 30


def test_a_disk_that_fills_in_a_direct_write(small_disk: Path) -> None:
    version = Storage(small_disk)
    crash_sequence.save(version, 10, 0, SIZE)
    tensor = memoryview(mmap.mmap(-1, 2 * DISK_SIZE))
    with pytest.raises(StorageError, match="No space left on device"):
        version.write("checkpoints/step-00000020/model.pt", [tensor])
    assert os.listdir(small_disk / "checkpoints/step-00000020") == []
    assert store.newest_whole(version).step == 10


def test_a_disk_that_fills_at_any_write(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at that of the manifest, of run.json and of the fence, and in the middle of a write."""
    write = os.write
    for position in range(1, 200, 2):
        failure, version, count = "", Storage(memory_path / str(position)), 0
        reported: list[int] = []

        def write_until_full(descriptor: int, data: bytes, position: int = position) -> int:
            nonlocal count
            count += 1
            if count < position:
                return write(descriptor, data)
            write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", write_until_full)
        try:
            crash_sequence.save_repeatedly(version.uri, reported.append)
        except StorageError as error:
            failure = str(error)
        monkeypatch.undo()
        crash_sequence.check(version.uri, reported[-1] if reported else 0)
        if not failure:
            break
        assert "Free some space" in failure
    assert reported == list(crash_sequence.LOSSES)
    assert position > 50
