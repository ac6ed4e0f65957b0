"""Files on a local or mounted file system: written aside, synced to the disk, renamed into place."""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import mmap
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

# Names with this prefix are never listed: files that are still being written, claims, probes.
HIDDEN_PREFIX = ".raylight-"
_MIN_DIRECT_BYTES = 1 << 20  # what is smaller goes through the page cache


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in a folder; `name` is relative to what was listed, `size` in bytes (0 for a folder), `modified_at` in
    seconds since 1970."""

    name: str
    size: int
    is_directory: bool
    modified_at: float


class LocalFiles:
    """Files of this machine. All paths are absolute. Raises OSError as the operating system does."""

    is_local = True

    def open_sink(self, path: str) -> LocalSink:
        return LocalSink(path)

    def open_read(self, path: str) -> BinaryIO:
        return open(path, "rb")

    def read_bytes(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def info(self, path: str) -> Entry | None:
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _entry(os.path.basename(path), status, os.path.isdir(path))

    def list(self, path: str) -> builtins.list[Entry]:
        entries = (_entry_if_there(item, item.name) for item in _scan(path))
        return [entry for entry in entries if entry is not None]

    def walk(self, path: str) -> builtins.list[Entry]:
        return list(self._walk(path, ""))

    def _walk(self, path: str, prefix: str) -> Iterator[Entry]:
        """Links to folders are not followed: they may lead out, or around in a circle."""
        for item in _scan(path):
            if item.is_dir(follow_symlinks=False):
                yield from self._walk(item.path, f"{prefix}{item.name}/")
                continue
            entry = _entry_if_there(item, prefix + item.name)
            if entry is not None and not entry.is_directory:
                yield entry

    def delete(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        sync_directory(os.path.dirname(path))

    def is_link(self, path: str) -> bool:
        return os.path.islink(path)

    def delete_own(self, path: str, is_own: Callable[[str], bool]) -> builtins.list[str]:
        return delete_own(path, is_own)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Makes the file by a hard link to a whole one, which fails if the name exists: no reader sees a part of
        `data`."""
        sink = LocalSink(path)
        try:
            sink.write(memoryview(data))
            return sink.finish_exclusively()
        except BaseException:
            sink.abort()
            raise

    def make_directory(self, path: str) -> bool:
        """Returns True if this call made it, False if it was there; two callers never both get True."""
        make_directories(os.path.dirname(path))
        try:
            os.mkdir(path)
        except FileExistsError:
            return False
        sync_directory(os.path.dirname(path))
        return True


class LocalSink:
    """A file in the making. Until `finish` it has another name in the same folder; a killed writer leaves only that.

    Large pieces bypass the page cache if possible: their bytes are moved once less, and the disk works while they come.
    A write then takes half as much time from the threads that train.
    """

    def __init__(self, path: str):
        self._path = path
        self._folder = os.path.dirname(path)
        make_directories(self._folder)
        self._partial = os.path.join(self._folder, f"{HIDDEN_PREFIX}{uuid.uuid4().hex}.partial")
        self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._position = 0

    def write(self, view: memoryview) -> None:
        while view.nbytes:
            num_written = self._write_direct(view) or os.write(self._descriptor, view)
            self._position += num_written
            view = view[num_written:]

    def _write_direct(self, view: memoryview) -> int:
        """Returns how many bytes the disk has fetched from memory by itself; 0 if the piece is small, begins in the
        middle of a page in the file or in memory, or lies on a file system that cannot do it."""
        num_bytes = view.nbytes - view.nbytes % mmap.PAGESIZE
        if num_bytes < _MIN_DIRECT_BYTES or self._position % mmap.PAGESIZE or not hasattr(os, "O_DIRECT"):
            return 0
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            return os.write(self._descriptor, view[:num_bytes])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0
        finally:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)

    def finish(self) -> None:
        self._close_synced()
        os.replace(self._partial, self._path)
        sync_directory(self._folder)

    def finish_exclusively(self) -> bool:
        self._close_synced()
        try:
            os.link(self._partial, self._path)
        except FileExistsError:
            return False
        finally:
            os.unlink(self._partial)
        sync_directory(self._folder)
        return True

    def abort(self, failed: bool = False) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if os.path.lexists(self._partial):
            os.unlink(self._partial)

    def _close_synced(self) -> None:
        os.fsync(self._descriptor)
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


def make_directories(path: str) -> None:
    """Like os.makedirs, but what it makes survives a power cut."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_directories(parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if os.path.isdir(path):
            return
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
    sync_directory(parent)


def sync_directory(path: str) -> None:
    """Syncs a folder: a new or removed name is on the disk only then."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return  # another process has removed the folder, and the name with it
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounted object stores cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def delete_own(path: str, is_own: Callable[[str], bool]) -> list[str]:
    """Deletes the files of a folder whose name `is_own`, then the folder if nothing else is in it. Returns the names of
    what stays, folders and links included. A file that another process removes at the same time is no error."""
    try:
        with os.scandir(path) as found:
            items = list(found)
    except FileNotFoundError:
        return []
    stays = []
    for item in items:
        if is_own(item.name) and item.is_file(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(item.path)
        else:
            stays.append(item.name)
    if not stays:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)
    return sorted(stays)


def _scan(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return [item for item in found if not item.name.startswith(HIDDEN_PREFIX)]
    except FileNotFoundError:
        return []


def _entry(name: str, status: os.stat_result, is_directory: bool) -> Entry:
    return Entry(name, 0 if is_directory else status.st_size, is_directory, status.st_mtime)


def _entry_if_there(item: os.DirEntry[str], name: str) -> Entry | None:
    try:
        return _entry(name, item.stat(), item.is_dir())
    except FileNotFoundError:
        return None  # removed since the folder was read, or a broken link
