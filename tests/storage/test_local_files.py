"""Large pieces go past the page cache; whatever the pieces and the file system, the bytes are the same."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from raylight.storage.local_files import LocalSink

MB = 1 << 20
PAGE = mmap.PAGESIZE


def on_a_page(data: bytes) -> memoryview:
    """`data` at an address that is a multiple of the page size."""
    memory = mmap.mmap(-1, len(data))
    memory.write(data)
    return memoryview(memory)


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def write(path: Path, pieces: list[memoryview]) -> None:
    sink = LocalSink(str(path))
    for piece in pieces:
        sink.write(piece)
    sink.finish()


@pytest.fixture
def direct_writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the pieces that went past the page cache."""
    sizes, real = [], os.write

    def watched(descriptor: int, data: memoryview) -> int:
        num_written = real(descriptor, data)
        if is_direct(descriptor):
            sizes.append(num_written)
        return num_written

    monkeypatch.setattr(os, "write", watched)
    return sizes


def pieces_of(seed: int) -> list[memoryview]:
    """Headers, tensors that begin on a page and others, with and without a rest."""
    chance = random.Random(seed)
    pieces, position = [], 0
    for size in chance.choices((1, PAGE, 100_000, MB, 2 * MB + 17, 3 * MB, 3 * MB + PAGE), k=8):
        header = chance.choice((1, PAGE - position % PAGE))
        pieces += [memoryview(chance.randbytes(header)), on_a_page(chance.randbytes(size))[chance.choice((0, 0, 1)) :]]
        position += sum(piece.nbytes for piece in pieces[-2:])
    return pieces


@pytest.mark.parametrize("seed", range(10))
def test_pieces_of_all_sizes_and_places(tmp_path: Path, seed: int) -> None:
    pieces = pieces_of(seed)
    write(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_large_pieces_that_begin_on_a_page_go_past_the_page_cache(tmp_path: Path, direct_writes: list[int]) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct writes")
    large = on_a_page(random.Random(0).randbytes(4 * MB))
    pieces = [large[: 2 * MB], large[:PAGE], large[PAGE : 3 * MB + 5], large[: 2 * MB]]
    write(tmp_path / "file", pieces)
    assert direct_writes == [2 * MB, 3 * MB - PAGE]
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def refusing_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


def refusing_write(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def refuse(descriptor: int, data: memoryview) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", refuse)


def missing_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")


@pytest.mark.parametrize("refuse", [refusing_flag, refusing_write, missing_flag])
def test_a_file_system_without_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], None]
) -> None:
    pieces = pieces_of(0)
    refuse(monkeypatch)
    write(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_a_direct_write_that_takes_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, pieces = os.write, pieces_of(1)
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[: 512 * 1001]))
    write(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_another_error_of_a_direct_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", fail)
    sink = LocalSink(str(tmp_path / "file"))
    with pytest.raises(OSError, match="Input/output error"):
        sink.write(on_a_page(bytes(2 * MB)))
    sink.abort()
    assert list(tmp_path.iterdir()) == []
