"""One file by its own path or URI: a checkpoint that somebody has named."""

from __future__ import annotations

import os
from typing import Any, BinaryIO

from raylight.storage.filesystem import FileWriter, Storage

FilePath = str | os.PathLike[str]


def open_write(path: FilePath, filesystem: Any = None) -> FileWriter:
    """A context manager with `write(chunk)`. The file appears whole when it closes, or not at all."""
    file = Storage(path, filesystem)
    return file.parent().open_write(file.name)


def open_read(path: FilePath, filesystem: Any = None) -> BinaryIO:
    """A seekable binary file. Raises MissingFile if there is none."""
    file = Storage(path, filesystem)
    return file.parent().open_read(file.name)


def remove(path: FilePath, filesystem: Any = None) -> None:
    """Deletes the file, or the folder of a checkpoint; it may be gone already."""
    file = Storage(path, filesystem)
    file.parent().delete(file.name)


def is_file(path: FilePath, filesystem: Any = None) -> bool:
    file = Storage(path, filesystem)
    entry = file.parent().info(file.name)
    return entry is not None and not entry.is_directory
