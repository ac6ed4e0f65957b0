"""Files on any pyarrow.fs file system: S3, Google Cloud Storage, Azure, HDFS, or one that the caller made."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import io
import random
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from raylight.contract.errors import MissingFile, StorageError
from raylight.storage.local_files import HIDDEN_PREFIX, Entry
from raylight.storage.outage import Outage
from raylight.storage.retry import Backoff, is_worth_retrying, note_if_given_up, retry

if TYPE_CHECKING:
    from pyarrow import fs

SINGLE_PUT_SIZE = 8 << 20  # up to here a file is held in memory and sent whole, so that each try is one request
SLICE_SIZE = 8 << 20
# pyarrow copies what it has not sent yet and sets no bound to it. It sends eight parts of 10 MB at once.
IN_FLIGHT_SIZE = 80 << 20
READ_BUFFER_SIZE = 4 << 20
NUM_TRIES_OF_A_PART = 8  # made by the S3 client itself, over about half a minute
# On these a file appears only when it is closed. On others (HDFS, fsspec) it grows in view of all.
OBJECT_STORES = ("s3", "gcs", "abfs")
Result = TypeVar("Result")


class RemoteFiles:
    """Files of one pyarrow file system; paths are as pyarrow wants them ("bucket/key"). Every call retries, and raises
    StorageError at the end.

    `open_filesystem(streaming)` is called in the process that needs it; with `streaming` the file system should retry
    by itself, because a stream cannot be sent again from here. `prefix` + path is how errors name a file.
    """

    is_local = False

    def __init__(self, open_filesystem: Callable[[bool], fs.FileSystem], backoff: Backoff, prefix: str):
        self._open_filesystem = open_filesystem
        self._backoff = backoff
        self._prefix = prefix
        self._opened: dict[bool, fs.FileSystem] = {}
        self._outage = Outage()  # shared by all storages that are made from one, in this process

    def __reduce__(self) -> tuple:
        return RemoteFiles, (self._open_filesystem, self._backoff, self._prefix)

    def filesystem(self, streaming: bool = False) -> fs.FileSystem:
        if streaming not in self._opened:
            self._opened[streaming] = self.retry(lambda: self._open_filesystem(streaming), "connect to", "")
        return self._opened[streaming]

    @property
    def appears_when_closed(self) -> bool:
        kind = self.filesystem().type_name
        return kind in OBJECT_STORES

    def retry(self, operation: Callable[[], Result], what: str, path: str) -> Result:
        return retry(operation, self._backoff, what, self._prefix + path, self._outage, lambda: self._answers(path))

    def note_broken_stream(self, error: OSError, path: str, took_s: float) -> None:
        """Counts as a failed operation: the client itself has tried the stream again, in vain."""
        if is_worth_retrying(error):
            self._outage.note_failure(error)
            note_if_given_up(self._outage, self._backoff, self._prefix + path, took_s, lambda: self._answers(path))

    def _answers(self, path: str) -> bool:
        """Whether the store answers a request that has nothing to do with the file: only the file is bad then."""
        opened = self._opened.get(False)
        if opened is None:
            return False
        try:
            opened.get_file_info(path.partition("/")[0] or "/")
        except OSError as error:
            return not is_worth_retrying(error)
        return True

    def open_sink(self, path: str) -> RemoteSink:
        return RemoteSink(self, path)

    def make_parent(self, path: str) -> None:
        """Makes the folder of a file; object stores have none."""
        if not self.appears_when_closed:
            parent = path.rpartition("/")[0]
            self.retry(lambda: self.filesystem().create_dir(parent, recursive=True), "create", parent)

    def put(self, path: str, data: bytes | bytearray) -> None:
        filesystem = self.filesystem()
        self.make_parent(path)

        def put_once() -> None:
            stream = filesystem.open_output_stream(path)
            try:
                stream.write(data)
            finally:
                stream.close()  # also after a failure: the destructor would send the data once more, later

        self.retry(put_once, "write", path)

    def open_read(self, path: str) -> BinaryIO:
        file = self.retry(lambda: self.filesystem().open_input_file(path), "read", path)
        return cast(BinaryIO, io.BufferedReader(_RemoteReader(self, path, file), READ_BUFFER_SIZE))

    def read_bytes(self, path: str) -> bytes:
        """Reads the whole file. Size and bytes come in two answers: if the file is replaced in between, pyarrow gives a
        part of the new one, or more than it has."""

        def read_once() -> bytes:
            with self.filesystem().open_input_file(path) as file:
                data: bytes = file.readall()
            if self.filesystem().get_file_info(path).size != len(data):
                raise OSError("it was replaced while it was being read")
            return data

        return self.retry(read_once, "read", path)

    def info(self, path: str) -> Entry | None:
        found = self.retry(lambda: self.filesystem().get_file_info(path), "look at", path)
        return _entry(found, found.base_name) if found.type.name in ("File", "Directory") else None

    def list(self, path: str) -> builtins.list[Entry]:
        return self._select(path, recursive=False)

    def walk(self, path: str) -> builtins.list[Entry]:
        return [entry for entry in self._select(path, recursive=True) if not entry.is_directory]

    def _select(self, path: str, recursive: bool) -> builtins.list[Entry]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(path, allow_not_found=True, recursive=recursive)
        found = self.retry(lambda: self.filesystem().get_file_info(selector), "list", path)
        entries = (_entry(info, info.path[len(path) :].strip("/")) for info in found)
        return [entry for entry in entries if entry.name and not _is_hidden(entry.name)]

    def delete(self, path: str) -> None:
        def delete_once() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem().delete_file(path)

        self.retry(delete_once, "delete", path)

    def is_link(self, path: str) -> bool:
        """Whether `path` is a link. Object stores have none; of pyarrow's file systems only those of fsspec have."""
        wrapped = getattr(getattr(self.filesystem(), "handler", None), "fs", None)
        if wrapped is None:
            return False
        try:
            facts = self.retry(lambda: wrapped.info(path), "look at", path)
        except MissingFile:
            return False
        return bool(facts.get("islink")) or facts.get("type") == "link"

    def delete_own(self, path: str, is_own: Callable[[str], bool]) -> builtins.list[str]:
        """As `local_files.delete_own`."""
        from pyarrow.fs import FileSelector

        selector = FileSelector(path, allow_not_found=True)
        found = self.retry(lambda: self.filesystem().get_file_info(selector), "list", path)
        own = [info for info in found if info.type.name == "File" and is_own(info.base_name)]
        if len(own) < len(found):
            for info in own:
                self.delete(info.path)
            return sorted(info.base_name for info in found if info not in own)

        def delete_once() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem().delete_dir(path)

        self.retry(delete_once, "delete", path)
        return []

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Returns True to at most one caller, ever: the one whose claim stood alone, who then writes the file."""
        folder, _, name = path.rpartition("/")
        claims = f"{folder}/{HIDDEN_PREFIX}claims/{name}"
        for _ in range(self._backoff.num_attempts):
            if self.info(path) is not None:
                return False
            if self.claim(claims) == 0:
                self.put(path, data)
                return True
            time.sleep(random.uniform(0.0, 0.5))  # rivals that met once must not meet again in step
        if self.info(path) is not None:
            return False
        raise StorageError(
            f"could not create {self._prefix}{path}: another process claimed it and did not write it.\n"
            f"If none is doing so now, delete {self._prefix}{claims} and try again."
        )

    def claim(self, path: str) -> int:
        """Claims the name `path` without a conditional write; returns 0 to at most one caller, ever.

        Each caller writes a token of its own under `path`, then lists the tokens, and wins if its own is the only
        one. Two winners would each have listed before the other wrote, which cannot be, provided that the store's lists
        show every finished write (those of S3, GCS, Azure and HDFS do). The tokens of winners stay. Losers take theirs
        back and get their place among those that met, counted from 1.
        """
        token = uuid.uuid4().hex
        mine = f"{path}/{token}"
        if self._select(path, recursive=False):
            return 1
        self.put(mine, b"claimed\n")
        tokens = sorted(entry.name for entry in self._select(path, recursive=False))
        if tokens == [token]:
            return 0
        self.delete(mine)
        return 1 + tokens.index(token)


class RemoteSink:
    """A file in the making: small ones are sent by `finish`, larger ones part by part while they are written."""

    def __init__(self, files: RemoteFiles, path: str):
        self._files = files
        self._path = path
        self._pending = bytearray()
        self._stream: Any = None
        self._num_in_flight = 0
        self._keeps_aside = not files.appears_when_closed
        folder, _, name = path.rpartition("/")
        partial = f"{folder}/{HIDDEN_PREFIX}{uuid.uuid4().hex}-{name}"
        self._target = partial if self._keeps_aside else path

    def write(self, view: memoryview) -> None:
        if self._stream is None:
            if len(self._pending) + view.nbytes <= SINGLE_PUT_SIZE and not self._keeps_aside:
                self._pending += view
                return
            self._open_stream()
        self._send(view)

    def finish(self) -> None:
        if self._stream is None and not self._keeps_aside:
            self._files.put(self._path, self._pending)
            return
        if self._stream is None:
            self._open_stream()
        with self._noting_failure():
            self._stream.close()
        if self._keeps_aside:
            filesystem = self._files.filesystem()
            self._files.retry(lambda: filesystem.move(self._target, self._path), "rename", self._target)

    def abort(self, failed: bool) -> None:
        """Leaves nothing under the final name. `failed`: storage failed, so the stream cannot complete."""
        stream, self._stream = self._stream, None
        self._pending = bytearray()
        if stream is None or stream.closed:
            return
        if failed or self._keeps_aside:
            with contextlib.suppress(OSError):  # it repeats a failure that the caller hears of
                stream.close()
            if self._keeps_aside:
                self._files.delete(self._target)
            return
        # pyarrow offers no way to abandon an upload: closing the stream, and its destructor too, would complete the
        # file with what was written so far. So it must never be destroyed. That costs a buffer of 10 MB, and parts on
        # the store that its rule for unfinished uploads removes, as after a kill.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))

    def _open_stream(self) -> None:
        filesystem = self._files.filesystem(streaming=True)
        self._files.make_parent(self._path)
        self._stream = self._files.retry(lambda: filesystem.open_output_stream(self._target), "write", self._path)
        pending, self._pending = self._pending, bytearray()
        self._send(memoryview(pending))

    def _send(self, view: memoryview) -> None:
        for start in range(0, view.nbytes, SLICE_SIZE):
            part = view[start : start + SLICE_SIZE]
            with self._noting_failure():
                self._stream.write(part)
                self._num_in_flight += part.nbytes
                if self._num_in_flight >= IN_FLIGHT_SIZE:
                    self._stream.flush()
                    self._num_in_flight = 0

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except OSError as error:
            self._files.note_broken_stream(error, self._path, time.monotonic() - began)
            raise


class _RemoteReader(io.RawIOBase):
    """A seekable file whose reads are tried again if storage fails."""

    def __init__(self, files: RemoteFiles, path: str, file: Any):
        self._files, self._path, self._file = files, path, file
        self._size = file.size()
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self._read(view.nbytes)
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Reads all in one request; without this, Python asks for 8 kB at a time."""
        return self._read(self._size)

    def _read(self, most: int) -> bytes:
        wanted = min(most, max(0, self._size - self._position))

        def read_once() -> bytes:
            data = self._file.read_at(wanted, self._position)
            if len(data) < wanted:
                raise OSError(f"the connection ended after {len(data)} of {wanted} bytes")
            return data

        data = self._files.retry(read_once, "read", self._path) if wanted else b""
        self._position += wanted
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _entry(info: fs.FileInfo, name: str) -> Entry:
    is_directory = info.type.name == "Directory"
    modified_at = info.mtime.timestamp() if info.mtime is not None else 0.0
    return Entry(name, 0 if is_directory else info.size, is_directory, modified_at)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(HIDDEN_PREFIX) for part in name.split("/"))
