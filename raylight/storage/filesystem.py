"""Storage: one place, local or remote, where a run keeps its files."""

from __future__ import annotations

import builtins
import copy
import os
import shlex
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote

from raylight.contract.errors import InvalidArguments, StorageError
from raylight.contract.layout import MANIFEST_FILE
from raylight.contract.messages import Saved, SavedFile
from raylight.storage.digests import format_digest, new_digest
from raylight.storage.local_directory import LocalDirectory
from raylight.storage.local_files import HIDDEN_PREFIX, Entry, LocalFiles, LocalSink
from raylight.storage.location import locate
from raylight.storage.manifest import Manifest
from raylight.storage.remote_files import RemoteSink
from raylight.storage.retry import Backoff, explain, is_worth_retrying, logger, reason

NUM_REQUESTS_AT_ONCE = 16
NUM_SENDS_OF_A_FILE = 3
Item = TypeVar("Item")
Result = TypeVar("Result")
Chunk = bytes | bytearray | memoryview


class Storage:
    """Files under one root: a folder of this machine or of a mounted share, or a URI of `pyarrow.fs`.

    All paths are relative to the root, with "/" between their parts, and cannot leave it. What is written appears under
    its name at once and whole, or not at all, even if the writer is killed. Remote calls are tried again with growing
    random waits; one that still fails raises StorageError. Storage can be pickled, and used by several threads.
    """

    def __init__(self, root: str | os.PathLike[str], filesystem: Any = None, *, backoff: Backoff | None = None):
        location = locate(root, filesystem, backoff or Backoff())
        self._files = location.files
        self._root = location.root
        self._shown = location.shown
        self._query = location.query

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    @property
    def uri(self) -> str:
        """The root as a person writes it: an absolute path or a URI, without passwords."""
        return self._shown + self._query

    @property
    def name(self) -> str:
        """The last part of the root."""
        return self._root.rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        return self._files.is_local

    def uri_of(self, path: str) -> str:
        return self._shown_at(path) + self._query

    def argument_of(self, path: str) -> str:
        """`uri_of` quoted for a shell, in which the "&" of a query would end the command."""
        return shlex.quote(self.uri_of(path))

    def child(self, *parts: str) -> Storage:
        """The storage rooted at a folder in this one."""
        path = "/".join(parts)
        there = copy.copy(self)
        there._root = self._absolute(path)
        there._shown = self._shown_at(path)
        return there

    def parent(self) -> Storage:
        """The storage rooted one folder up."""
        above = copy.copy(self)
        above._root = self._root.rpartition("/")[0] or "/"
        above._shown = self._shown.rpartition("/")[0] or "/"
        return above

    def write(self, path: str, chunks: Iterable[Chunk]) -> SavedFile:
        """Writes one file. On remote storage, `chunks` that can be iterated again are sent again after a failure."""
        tries = 1 if self.is_local or iter(chunks) is chunks else NUM_SENDS_OF_A_FILE
        for left in reversed(range(tries)):
            file = self.open_write(path)
            try:
                with file:
                    for chunk in chunks:
                        file.write(chunk)
                return file.saved
            except StorageError as error:
                if not left or not file.broke or not is_worth_retrying(cast(OSError, error.__cause__)):
                    raise
                logger.warning("%s\nSending it again from the start.", error)
        raise AssertionError("unreachable: the last try returns or raises")

    def open_write(self, path: str) -> FileWriter:
        """A context manager with `write(chunk)`, and after a clean exit `saved`. An exception leaves no file."""
        return FileWriter(self, path)

    def open_read(self, path: str) -> BinaryIO:
        """A seekable binary file. Raises MissingFile if there is none."""
        with self._explained("read", path):
            return self._files.open_read(self._absolute(path))

    def read_bytes(self, path: str) -> bytes:
        """The whole file; if it is being replaced, the whole old or the whole new one."""
        with self._explained("read", path):
            return self._files.read_bytes(self._absolute(path))

    def local_path(self, path: str = "") -> str | None:
        """The path on this machine; None if storage is remote."""
        return self._absolute(path) if self.is_local else None

    def local_directory(self) -> LocalDirectory:
        """A directory of this machine for files that grow, which are copied to the root."""
        return LocalDirectory(self)

    def local_spare(self) -> LocalSpare:
        """A new folder of this machine, for a last checkpoint that storage does not take."""
        return LocalSpare(Storage(tempfile.mkdtemp(prefix="raylight-kept-")))

    def list(self, path: str = "") -> builtins.list[Entry]:
        """The entries of a folder, sorted by name; empty if there is no such folder."""
        with self._explained("list", path):
            return sorted(self._files.list(self._absolute(path)), key=lambda entry: entry.name)

    def walk(self, path: str = "") -> builtins.list[Entry]:
        """All files under a folder, named relative to it, sorted by name."""
        with self._explained("list", path):
            return sorted(self._files.walk(self._absolute(path)), key=lambda entry: entry.name)

    def info(self, path: str = "") -> Entry | None:
        with self._explained("look at", path):
            return self._files.info(self._absolute(path))

    def exists(self, path: str = "") -> bool:
        return self.info(path) is not None

    def delete(self, path: str) -> None:
        """Deletes a file; a missing one is no error. Raises StorageError if a link leads to it."""
        with self._explained("delete", path):
            self._check_no_link(path.rpartition("/")[0])
            self._files.delete(self._absolute(path))

    def delete_own(self, path: str, is_own: Callable[[str], bool]) -> builtins.list[str]:
        """Deletes the files of a folder whose name `is_own`, then the folder if nothing else is in it; a missing folder
        is no error. Returns the names of what stays. Raises StorageError if a link leads to it."""
        if not path:
            raise ValueError("the root of a storage is not deleted")
        with self._explained("delete", path):
            self._check_no_link(path)
            return self._files.delete_own(self._absolute(path), is_own)

    def is_link(self, path: str) -> bool:
        with self._explained("look at", path):
            return self._files.is_link(self._absolute(path))

    def _check_no_link(self, path: str) -> None:
        """Raises StorageError if a link leads to `path`. The root itself, which a person has named, may be a link."""
        parts = path.split("/") if path else []
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth])
            if self._files.is_link(self._absolute(folder)):
                raise StorageError(
                    f"{self.uri_of(folder)} is a link, through which nothing is deleted. Delete what it leads to by "
                    "hand if it is not needed."
                )

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Creates a file that was not there; of several callers at most one gets True."""
        with self._explained("create", path):
            return self._files.create_exclusive(self._absolute(path), data)

    def claim_directory(self, path: str) -> int:
        """Claims a name for a folder. 0: it is the caller's alone, for good. Otherwise it is lost, and the number
        differs between rivals, so that they need not meet again at the next name."""
        with self._explained("create", path):
            if isinstance(self._files, LocalFiles):
                return 0 if self._files.make_directory(self._absolute(path)) else 1
            folder, _, name = self._absolute(path).rpartition("/")
            return self._files.claim(f"{folder}/{HIDDEN_PREFIX}claims/{name}")

    def claimed_names(self) -> builtins.list[str]:
        """Names of folders that were claimed in the root, empty ones included."""
        names = {entry.name for entry in self.list() if entry.is_directory}
        if not self.is_local:
            names.update(entry.name for entry in self.list(f"{HIDDEN_PREFIX}claims"))
        return sorted(names)

    def check_writable(self) -> None:
        """Writes, reads and deletes a small file. Raises StorageError with the problem and what to do."""
        probe, data = f"{HIDDEN_PREFIX}probe-{uuid.uuid4().hex}", os.urandom(16)
        self.write(probe, [data])
        if self.read_bytes(probe) != data:
            raise StorageError(f"{self.uri} gave back other bytes than were written. Choose another storage_path.")
        self.delete(probe)

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], num_local_threads: int = 1
    ) -> builtins.list[Result]:
        """`[function(item) for item in items]`, several at once if each waits for the network. `num_local_threads`
        may be more if `function` releases the interpreter lock, as reading and hashing large files does."""
        items = list(items)
        num_threads = min(len(items), num_local_threads if self.is_local else NUM_REQUESTS_AT_ONCE)
        if num_threads < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(num_threads, thread_name_prefix="raylight-storage") as pool:
            return list(pool.map(function, items))

    def _shown_at(self, path: str) -> str:
        if not path:
            return self._shown
        return f"{self._shown.rstrip('/')}/{path if self.is_local else quote(path)}"

    def _absolute(self, path: str) -> str:
        if not path:
            return self._root
        if path.startswith("/") or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
            raise InvalidArguments(f"{path!r} is not a plain path inside {self.uri}.")
        return f"{self._root.rstrip('/')}/{path}"

    def _open_sink(self, path: str) -> LocalSink | RemoteSink:
        return self._files.open_sink(self._absolute(path))

    @contextmanager
    def _explained(self, what: str, path: str) -> Iterator[None]:
        """Turns errors of the operating system or pyarrow into a StorageError."""
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise explain(error, what, self.uri_of(path)) from error


class FileWriter:
    """One file in the making; `saved` is its SavedFile after a clean exit. Made by `Storage.open_write`."""

    saved: SavedFile

    def __init__(self, storage: Storage, path: str):
        self._storage = storage
        self._path = path
        self._size = 0
        self.broke = False  # the storage failed in the middle of the file

    def __enter__(self) -> FileWriter:
        self._digest = new_digest()
        with self._storage._explained("write", self._path):
            self._sink = self._storage._open_sink(self._path)
        return self

    def write(self, chunk: Chunk) -> int:
        view = memoryview(chunk)
        view = view if view.format == "B" and view.ndim == 1 else view.cast("B")
        with self._noting_failure():
            self._digest.update(view)
            self._sink.write(view)
        self._size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Does nothing: the file counts once it is finished. Some writers call it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with self._noting_failure():
                    self._sink.finish()
                self.saved = SavedFile(self._path, self._size, format_digest(self._digest))
        finally:
            if not hasattr(self, "saved"):
                self._abort()

    def _abort(self) -> None:
        try:
            self._sink.abort(failed=self.broke)
        except OSError as error:  # the caller is on the way out with the first cause already
            logger.warning("could not clean up after writing %s: %s", self._storage.uri_of(self._path), reason(error))

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        with self._storage._explained("write", self._path):
            try:
                yield
            except OSError:
                self.broke = True
                raise


class LocalSpare:
    """A spare place for a last checkpoint, made by `Storage.local_spare`: `files` is a new folder of this machine."""

    def __init__(self, files: Storage):
        self.files = files

    def commit(self, saved: Saved, seed: int) -> str:
        """Commits the checkpoint that one rank has written whole. Returns its URI, which `resume=` takes whatever the
        storage of the run is."""
        manifest = Manifest(
            step=saved.step, epoch=saved.epoch, files=saved.files, metrics=saved.metrics,
            weights_only=saved.weights_only, seed=seed,
        )  # fmt: skip
        self.files.write(f"{saved.directory}/{MANIFEST_FILE}", [manifest.to_bytes()])
        path: Any = self.files.local_path(saved.directory)
        return f"file://{quote(path)}"
