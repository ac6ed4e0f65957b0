"""TensorBoard's event files, written without importing TensorBoard.

Its own writer takes a second to import and 30 us a row, most of it for checksums in pure Python, all under the
interpreter lock that a training loop of the same process needs. Here numpy lays out and checksums all rows of a
batch together, at about 3 us a row. The format is that of `event.proto` and `record_writer.py` of
https://github.com/tensorflow/tensorboard: each record is its length, a checksum of that, an `Event`, its checksum.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from raylight.contract.plain_text import to_utf8

if TYPE_CHECKING:
    import numpy as np

ScalarRow = tuple[dict[str, float], int, float]
"""(values by name, step, seconds since 1970); values beyond the range of float32 become infinite"""

Event = Callable[[], bytes]
"""Gives a serialized `Event`; called when it is written"""

HEADER_BYTES = 12
FOOTER_BYTES = 4


class EventFile:
    """A new event file in `directory`, which must exist. Rows go to the operating system at once."""

    def __init__(self, directory: str):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self.path = os.path.join(directory, name)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._size = 0
        self.append([lambda: b"\x09" + struct.pack("<d", time.time()) + b"\x1a" + _delimit(b"brain.Event:2")])

    def append(self, rows: Sequence[ScalarRow | Event]) -> None:
        """Append all rows in order, or none if the file system refuses (a reader stops at a torn record)."""
        left = memoryview(_frame(rows))
        size = len(left)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += size

    def close(self) -> None:
        os.close(self._descriptor)


def encode_restart(step: int, seconds: float) -> bytes:
    """An `Event` that makes TensorBoard hide earlier values of this step and later ones."""
    return b"\x09" + struct.pack("<d", seconds) + b"\x10" + _varint(step) + b"\x3a\x02\x08\x01"


def _frame(rows: Sequence[ScalarRow | Event]) -> bytes:
    records = [b""] * len(rows)
    alike: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if isinstance(row, tuple):
            alike[tuple(row[0]), len(_varint(row[1]))].append(index)
        else:
            event = row()
            records[index] = _header(len(event)) + event + _checksum([list(event)]).tobytes()
    for (names, _), indices in alike.items():
        block = _encode_alike(names, [rows[index] for index in indices])  # type: ignore[misc]
        size = len(block) // len(indices)
        for position, index in enumerate(indices):
            records[index] = block[position * size : (position + 1) * size]
    return b"".join(records)


def _encode_alike(names: tuple[str, ...], rows: list[ScalarRow]) -> bytes:
    """The records of rows with the same names, and steps that take the same number of bytes."""
    import numpy as np

    steps = np.array([step for _, step, _ in rows], dtype=np.int64)
    template, offsets = _layout(names, len(_varint(rows[0][1])))
    records = np.empty((len(rows), len(template)), dtype=np.uint8)
    records[:] = np.frombuffer(template, dtype=np.uint8)
    _put(records, HEADER_BYTES + 1, np.array([seconds for _, _, seconds in rows], dtype="<f8"))
    num_step_bytes = len(_varint(rows[0][1]))
    for position in range(num_step_bytes):
        more = 0x80 if position < num_step_bytes - 1 else 0
        records[:, HEADER_BYTES + 10 + position] = (steps >> (7 * position)) & 0x7F | more
    with np.errstate(over="ignore"):
        values = np.array([list(values.values()) for values, _, _ in rows], dtype=np.float64).astype("<f4")
    for column, offset in enumerate(offsets):
        _put(records, offset, values[:, column])
    _put(records, len(template) - FOOTER_BYTES, _checksum(records[:, HEADER_BYTES:-FOOTER_BYTES]))
    return records.tobytes()


@lru_cache(maxsize=1024)
def _layout(names: tuple[str, ...], num_step_bytes: int) -> tuple[bytes, tuple[int, ...]]:
    """A record with zeros for wall time (byte 1 of the event), step (byte 10), values and checksum, and the
    offsets of the values."""
    summary, ends = b"", []
    for name in names:
        tag = b"\x0a" + _delimit(to_utf8(name).encode())
        summary += b"\x0a" + _delimit(tag + b"\x15" + bytes(4))
        ends.append(len(summary))
    before = b"\x09" + bytes(8) + b"\x10" + bytes(num_step_bytes) + b"\x2a" + _varint(len(summary))
    event = before + summary
    start = HEADER_BYTES + len(before) - 4
    return _header(len(event)) + event + bytes(FOOTER_BYTES), tuple(start + end for end in ends)


def _put(records: np.ndarray, offset: int, column: np.ndarray) -> None:
    """Write the bytes of `column`, one item a record, at `offset` of each record."""
    records[:, offset : offset + column.itemsize] = column.copy().view("u1").reshape(len(column), -1)


def _delimit(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


@lru_cache(maxsize=1024)
def _header(length: int) -> bytes:
    data = struct.pack("<Q", length)
    return data + _checksum([list(data)]).tobytes()


def _checksum(records: np.ndarray | list[list[int]]) -> np.ndarray:
    """The masked CRC-32C of each row of `records`, bytes of shape (records, bytes)."""
    import numpy as np

    table = _crc_table()
    crc = np.full(len(records), 0xFFFFFFFF, dtype=np.uint32)
    for column in np.ascontiguousarray(np.asarray(records, dtype=np.uint8).T):
        crc = table[(crc ^ column) & 0xFF] ^ (crc >> np.uint32(8))
    crc = ~crc
    return (((crc >> np.uint32(15)) | (crc << np.uint32(17))) + np.uint32(0xA282EAD8)).astype("<u4")


@lru_cache(maxsize=1)
def _crc_table() -> np.ndarray:
    import numpy as np

    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> np.uint32(1)) ^ np.uint32(0x82F63B78), table >> np.uint32(1))
    return table.astype(np.uint32)
