"""The output of a worker: into logs/rank-N.log in the version directory, and for rank 0 to the driver as well."""

from __future__ import annotations

import codecs
import ctypes
import fcntl
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator

from raylight.contract.errors import StorageError
from raylight.contract.layout import log_file
from raylight.contract.task import Files

UPLOAD_EVERY_S = 30.0
_CHUNK_BYTES = 1 << 20


class WorkerLog:
    """Takes all that this process writes to file descriptors 1 and 2 from now on, C libraries and children included.

    On a local path the log is written in place, so that the last words of a process that is killed are there. Else it
    is a temporary file that is copied to storage every `upload_every_s` and at the end. With `files` None it is only a
    temporary file. A log that exists is continued.
    """

    def __init__(self, files: Files | None, rank: int, upload_every_s: float = UPLOAD_EVERY_S):
        self._files, self._name, self._upload_every_s = files, log_file(rank), upload_every_s
        in_place = files.local_path(self._name) if files is not None else None
        self._fd = _open_log(in_place)
        weakref.finalize(self, os.close, self._fd)  # not in `close`: who follows the log has yet to read its end
        self._uploads = files is not None and in_place is None
        if self._uploads:
            self._continue_earlier()
        self._read_to = os.fstat(self._fd).st_size
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._reading = threading.Lock()
        self._closed = threading.Event()
        self._upload_error: str | None = None
        self._uploader = threading.Thread(target=self._upload_regularly, name="raylight log upload", daemon=True)
        self._saved = _redirect(self._fd)
        if self._uploads:
            self._uploader.start()

    def read(self) -> str:
        """The text that was printed since the last call. Any thread may ask; each piece of text is given once."""
        with self._reading:
            data = os.pread(self._fd, max(0, os.fstat(self._fd).st_size - self._read_to), self._read_to)
            self._read_to += len(data)
            return self._decoder.decode(data)

    def follow(self, every_s: float) -> Iterator[str]:
        """Text as it comes, until the log is closed; blocks."""
        is_closed = False
        while not is_closed:
            is_closed = self._closed.wait(every_s)
            text = self.read()
            if text:
                yield text

    def flush(self) -> None:
        """Brings what Python and C still hold back into the log."""
        _flush_streams()

    def close(self) -> str | None:
        """Gives the descriptors back. Returns why the log could not be copied to storage, if it could not."""
        if not self._closed.is_set():
            _flush_streams()
            for number, fd in self._saved.items():
                os.dup2(fd, number)
                os.close(fd)
            self._closed.set()
            if self._uploads:
                self._uploader.join()
                self._upload()
        return self._upload_error

    # ---- storage that is not local

    def _continue_earlier(self) -> None:
        assert self._files is not None
        try:
            with self._files.open_read(self._name) as earlier:
                while chunk := earlier.read(_CHUNK_BYTES):
                    os.write(self._fd, chunk)
        except (StorageError, FileNotFoundError):
            return  # there is none, or none that can be read: then this log stands alone

    def _upload_regularly(self) -> None:
        pause_s, uploaded = self._upload_every_s, -1
        while not self._closed.wait(pause_s):
            size = os.fstat(self._fd).st_size
            if size != uploaded:
                began = time.monotonic()
                self._upload()
                uploaded = size
                pause_s = max(self._upload_every_s, 10 * (time.monotonic() - began))  # at most a tenth of the time

    def _upload(self) -> None:
        assert self._files is not None
        try:
            self._files.write(self._name, _Part(self._fd, os.fstat(self._fd).st_size))
            self._upload_error = None
        except StorageError as error:
            self._upload_error = str(error)


class _Part:
    """The first `size` bytes of a file, as chunks that can be iterated again."""

    def __init__(self, fd: int, size: int):
        self._fd, self._size = fd, size

    def __iter__(self) -> Iterator[bytes]:
        for offset in range(0, self._size, _CHUNK_BYTES):
            yield os.pread(self._fd, min(_CHUNK_BYTES, self._size - offset), offset)


def _open_log(path: str | None) -> int:
    """For appending. None: a file without a name, which is gone when the last process that has it ends."""
    if path is not None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    with tempfile.TemporaryFile() as unnamed:
        fd = os.dup(unnamed.fileno())
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    return fd


def _redirect(fd: int) -> dict[int, int]:
    """Points descriptors 1 and 2 to `fd`; returns duplicates of what they were."""
    _flush_streams()
    saved = {number: os.dup(number) for number in (1, 2)}
    for number in saved:
        os.dup2(fd, number)
    return saved


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    ctypes.CDLL(None).fflush(None)
