"""A directory on this machine for files that grow, for programs that append to a file."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator

from raylight.contract.errors import MissingFile, StorageError
from raylight.contract.task import Chunk, Files
from raylight.storage.local_files import HIDDEN_PREFIX, Entry, LocalFiles

CHUNK_BYTES = 1 << 20
MIN_COPY_INTERVAL_S = 5.0
MAX_COPY_SHARE = 0.1
"""A growing file is copied whole, since object stores cannot append, so copying is held to this share of the time."""


class LocalDirectory:
    """The version directory itself if it lies on this machine, otherwise a temporary one that is copied to storage."""

    def __init__(self, files: Files):
        self._files = files
        self._copied: dict[str, Entry] = {}  # as each file was then, by name
        self._next_copy = 0.0
        self._temporary: str | None = None

    @property
    def path(self) -> str:
        own_path = self._files.local_path("")
        if own_path is not None:
            os.makedirs(own_path, exist_ok=True)
            return own_path
        if self._temporary is None:
            self._temporary = tempfile.mkdtemp(prefix="raylight-")
            self._next_copy = time.monotonic() + MIN_COPY_INTERVAL_S
        return self._temporary

    def fetch(self, name: str) -> str:
        """The path of a file that continues the one an earlier process left on storage."""
        path = os.path.join(self.path, name)
        if self._temporary is not None and not os.path.exists(path):
            with contextlib.suppress(MissingFile):
                self._fetch(name, path)
        return path

    def copy(self) -> None:
        """Copy files that have grown to storage, if that is due."""
        if self._temporary is not None and time.monotonic() >= self._next_copy:
            self._copy(self._temporary)

    def close(self) -> None:
        """Copy the rest; the temporary directory is removed once that has worked."""
        if self._temporary is not None:
            try:
                self._copy(self._temporary)
            except (OSError, StorageError) as error:
                raise StorageError(f"{error}\nWhat could not be copied is kept in {self._temporary}") from error
            shutil.rmtree(self._temporary)
            self._temporary = None

    def _fetch(self, name: str, path: str) -> None:
        """Fetch under another name, then rename: a file read in part is fetched again, never copied over the whole
        one."""
        aside = os.path.join(os.path.dirname(path), f"{HIDDEN_PREFIX}{os.path.basename(path)}")
        with self._files.open_read(name) as there, open(aside, "wb") as here:
            shutil.copyfileobj(there, here)
        os.replace(aside, path)

    def _copy(self, directory: str) -> None:
        started = time.monotonic()
        for entry in sorted(LocalFiles().walk(directory), key=lambda entry: entry.name):
            if self._copied.get(entry.name) != entry:
                self._files.write(entry.name, _Head(os.path.join(directory, entry.name), entry.size))
                self._copied[entry.name] = entry
        took = time.monotonic() - started
        self._next_copy = time.monotonic() + max(MIN_COPY_INTERVAL_S, took / MAX_COPY_SHARE)


class _Head:
    """The first `size` bytes of a file that is being appended to; can be read again when a write is retried."""

    def __init__(self, path: str, size: int):
        self.path, self.size = path, size

    def __iter__(self) -> Iterator[Chunk]:
        left = self.size
        with open(self.path, "rb") as file:
            while left > 0 and (chunk := file.read(min(left, CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk
