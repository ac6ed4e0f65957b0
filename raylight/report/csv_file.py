"""Rows of metrics in one CSV file whose columns are all the names that were ever logged."""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raylight.contract.plain_text import to_utf8
from raylight.storage.local_files import HIDDEN_PREFIX

logger = logging.getLogger("raylight")
Row = Mapping[str, Any]


class CsvFile:
    """Appends rows, with columns in the order of their names; a new name has the file written again."""

    def __init__(self, path: str):
        self.path = path
        self._columns: list[str] = []
        if os.path.exists(path):
            self._columns = self._look_through()

    def append(self, rows: Sequence[Row | int]) -> None:
        """Append all rows, or none if the file system refuses. A number among them takes out earlier rows beyond that
        step."""
        rows = [row if isinstance(row, int) else {to_utf8(name): row[name] for name in row} for row in rows]
        added = [row for row in rows if not isinstance(row, int)]
        new = [name for name in dict.fromkeys(name for row in added for name in row) if name not in self._columns]
        if new or len(added) < len(rows):
            kept: list[Row] = self._read()
            for row in rows:
                kept = [old for old in kept if int(old["step"]) <= row] if isinstance(row, int) else [*kept, row]
            self._rewrite(sorted([*self._columns, *new]), kept)
        else:
            self._extend(added)

    def _look_through(self) -> list[str]:
        """The columns of a file that is continued; a damaged one is kept under another name."""
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                columns = list(reader.fieldnames or [])
                for row in reader:
                    int(row["step"])
                return columns
        except (csv.Error, ValueError, KeyError, TypeError) as error:
            folder, name = os.path.split(self.path)
            aside = f"damaged-{uuid.uuid4().hex[:8]}-{name}"
            os.replace(self.path, os.path.join(folder, aside))
            logger.warning("%s is damaged: %r. It is now called %s, and a new one begins.", self.path, error, aside)
            return []

    def _extend(self, rows: Iterable[Row]) -> None:
        size = os.path.getsize(self.path)
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerows(rows)
        except BaseException:
            os.truncate(self.path, size)
            raise

    def _read(self) -> list[Row]:
        if not self._columns:
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, columns: list[str], rows: Iterable[Row]) -> None:
        """Writes under another name, then renames: no reader and no crash sees half a file."""
        folder, name = os.path.split(self.path)
        aside = os.path.join(folder, f"{HIDDEN_PREFIX}{uuid.uuid4().hex}-{name}")
        try:
            with open(aside, "x", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(aside, self.path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first cause is on its way out already
                os.unlink(aside)
            raise
        self._columns = columns
