"""Memory that the processes of one machine share, without a name that could remain."""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Buffer = Any  # what supports the buffer protocol; typing has no word for it before Python 3.12


@dataclass(frozen=True, slots=True)
class SegmentAddress:
    """The way for other processes of the machine to a Segment: a file descriptor of the process that made it."""

    pid: int
    fd: int
    spans: tuple[tuple[int, int], ...]
    """Offset and size of each buffer."""


class Segment:
    """Buffers in anonymous shared memory, made once a machine and mapped by all its workers.

    It has no name, so it cannot remain: the system frees it when its maker and all who mapped it are gone,
    in whatever way. Linux only.
    """

    def __init__(self, buffers: Sequence[Buffer]):
        fd = os.memfd_create("raylight")
        self._fd: int | None = fd
        spans, end = [], 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            end = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
            spans.append((end, view.nbytes))
            _write_all(fd, view, end)
            end += view.nbytes
        self.address = SegmentAddress(os.getpid(), fd, tuple(spans))

    def close(self) -> None:
        """Processes that have mapped it keep it; nobody else can map it any more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def map_segment(address: SegmentAddress) -> list[memoryview]:
    """The buffers of a Segment, copy-on-write: what is written into them is seen by this process alone.

    Pages that nobody writes exist once for all processes.
    """
    fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_RDONLY)
    try:
        memory = memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY))
    finally:
        os.close(fd)
    return [memory[offset : offset + size] for offset, size in address.spans]


@functools.cache
def memory_domain() -> str | None:
    """Processes that give the same answer can map each other's segments. None: this system has none."""
    if not hasattr(os, "memfd_create"):
        return None
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')} {os.geteuid()}"


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    written = 0
    while written < view.nbytes:  # one call writes at most 2 GiB
        written += os.pwrite(fd, view[written:], offset + written)
