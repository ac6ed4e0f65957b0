"""Every logged value of a version, in one parquet table; part files of it while the version runs."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar

from raylight.contract.errors import MissingFile, StorageError
from raylight.contract.layout import METRICS_FILE
from raylight.contract.plain_text import to_utf8
from raylight.storage.damage import set_aside
from raylight.storage.row_writer import RowWriter

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("raylight.storage")
Result = TypeVar("Result")
PART_NAME = re.compile(r"metrics-(\d{5,})\.parquet")

WRITE_INTERVAL_S = 5.0
"""With the time of a write, well under the ten seconds of values that a crash may cost."""

ROWS_PER_PART = 1 << 17
"""A part is rewritten, whole, until it has this many rows (1 to 2 MB): few files, and little work each time."""

DROP_KEY = b"raylight.drop_after"
"""In the metadata of a part: the step beyond which the rows of all earlier files are taken back."""

MERGED_KEY = b"raylight.merged_parts"
"""In the metadata of `metrics.parquet`: parts with a lower number are in it, and are leftovers if they are there."""


Chunk = bytes | bytearray | memoryview


class Entry(Protocol):
    """A file of a folder."""

    @property
    def name(self) -> str: ...


class Files(Protocol):
    """`storage.filesystem.Storage`, as far as the journal needs it."""

    def write(self, path: str, chunks: Iterable[Chunk]) -> object: ...
    def open_read(self, path: str) -> BinaryIO: ...
    def read_bytes(self, path: str) -> bytes: ...
    def list(self, path: str) -> Iterable[Entry]: ...
    def delete(self, path: str) -> None: ...
    def uri_of(self, path: str) -> str: ...


class Damaged(StorageError):
    """The file `path` of the journal holds something else than was written."""

    def __init__(self, path: str, why: str):
        super().__init__(f"{path} is damaged: {why}")
        self.path, self.why = path, why


class Journal:
    """Keeps what is added in part files, at most a few seconds late, and merges them at `close`.

    Opened on a version that has rows already, it goes on after them. Adding costs a microsecond, a thread does the
    rest. While storage is away, rows are kept and offered again.
    """

    def __init__(self, files: Files):
        self._files = files
        self._writer: RowWriter[tuple] = RowWriter("metrics", self._take, self._store, WRITE_INTERVAL_S)
        self._tables: list[pa.Table] = []  # the rows of the open part
        self._drop: int | None = None  # what the open part takes back of all earlier files
        self._is_stored = True
        self._part_number: int | None = None  # found out by the first write

    def add(self, step: int, epoch: int, values: dict[str, float], time: float) -> None:
        """`time` is in seconds since 1970."""
        self._writer.add((step, epoch, time, values))

    def drop_after(self, step: int) -> None:
        """Take back all rows beyond `step`: an attempt begins that redoes those steps."""
        self._writer.add((step,))

    def flush(self) -> None:
        """Write now; what was added is on storage when this returns. The thread does so every few seconds."""
        self._writer.flush()

    def close(self, merge: bool = True) -> None:
        """Merge all parts into one file. Raises StorageError if that fails; the parts then stay as they are, as they
        do without `merge`, if another driver writes parts too."""
        self._writer.close()
        if merge:
            merge_metrics(self._files)

    def _take(self, rows: list[tuple]) -> None:
        waiting: list[tuple] = []
        for row in rows:
            if len(row) > 1:
                waiting.append(row)
                continue
            self._take_values(waiting)
            waiting = []
            self._take_back(*row)
        self._take_values(waiting)

    def _take_values(self, rows: list[tuple]) -> None:
        if rows:
            self._tables.append(_build_table(rows))
            self._is_stored = False

    def _take_back(self, step: int) -> None:
        self._tables = [_filter_steps(table, step) for table in self._tables]
        self._drop = step if self._drop is None else min(self._drop, step)
        self._is_stored = False

    def _store(self) -> None:
        if self._is_stored:
            return
        import pyarrow as pa

        if self._part_number is None:
            set_aside_damaged_metrics(self._files)
            self._part_number = _survey(self._files).next_part
        table = pa.concat_tables([_schema().empty_table(), *self._tables])
        metadata = {} if self._drop is None else {DROP_KEY: str(self._drop).encode()}
        self._files.write(f"metrics-{self._part_number:05d}.parquet", list(_encode([table], metadata)))
        self._is_stored = True
        self._tables = [table]
        if table.num_rows >= ROWS_PER_PART:
            self._tables, self._drop = [], None
            self._part_number += 1


def read_metrics(files: Files) -> pa.Table:
    """All rows of a version, running or not, in the order in which they were logged.

    Columns: step int64, epoch int64, name (dictionary of strings), value float64, time in microseconds, UTC. The rows
    of a damaged file are left out, with a warning.
    """
    import pyarrow as pa

    damaged: set[str] = set()

    def read() -> pa.Table:
        tables = list(_read_tables(files, _survey(files, damaged)))
        return pa.concat_tables([_schema().empty_table(), *tables]).unify_dictionaries()

    def leave_out(error: Damaged) -> None:
        logger.warning("%s is damaged: %s. Its rows are left out.", files.uri_of(error.path), error.why)
        damaged.add(error.path)

    def read_again() -> pa.Table:
        try:
            return read()
        except (MissingFile, Damaged):  # the run ended meanwhile and replaced its parts by one file
            return read()

    return _until_whole(read_again, leave_out)


def merge_metrics(files: Files) -> None:
    """Replace the parts that a finished or dead run left by one file. Safe to repeat after a crash at any point."""

    def merge() -> None:
        survey = _survey(files)
        if survey.parts:
            files.write(METRICS_FILE, _Merged(files, survey))
            for path in survey.parts:
                files.delete(path)

    _until_whole(merge, lambda error: _set_aside(files, error))


def set_aside_damaged_metrics(files: Files) -> None:
    """Called before a version goes on: all its rows are read once, and what cannot be read is said."""

    def read() -> None:
        for _ in _read_tables(files, _survey(files)):
            continue

    _until_whole(read, lambda error: _set_aside(files, error))


def _set_aside(files: Files, error: Damaged) -> None:
    set_aside(files, error.path, error.why, "The values in it are missing in the history of the version.")


def _until_whole(operation: Callable[[], Result], on_damage: Callable[[Damaged], None]) -> Result:
    """Calls `operation` again as long as it meets another damaged file."""
    while True:
        try:
            return operation()
        except Damaged as error:
            on_damage(error)


@dataclass(frozen=True, slots=True)
class _Survey:
    """The state of storage: part files, the number of the next one, and the files that hold rows, in order, each with
    the step beyond which later files take its rows back."""

    parts: tuple[str, ...]
    next_part: int
    limits: dict[str, int | None]


def _survey(files: Files, damaged: Collection[str] = ()) -> _Survey:
    """Raises Damaged for a file that is not among those known to be."""
    names = [entry.name for entry in files.list("") if entry.name not in damaged]
    parts = sorted((int(match[1]), match[0]) for match in map(PART_NAME.fullmatch, names) if match)
    metadata = {path: _read_metadata(files, path) for path in (METRICS_FILE,) if path in names}
    num_merged = _number_in(metadata.get(METRICS_FILE, {}), MERGED_KEY, METRICS_FILE)
    metadata |= {path: _read_metadata(files, path) for number, path in parts if number >= num_merged}
    limits: dict[str, int | None] = {}
    limit = None
    for path in reversed(metadata):
        limits[path] = limit
        if DROP_KEY in metadata[path]:
            drop = _number_in(metadata[path], DROP_KEY, path)
            limit = drop if limit is None else min(limit, drop)
    next_part = max([num_merged, *(number + 1 for number, _ in parts)])
    return _Survey(tuple(path for _, path in parts), next_part, dict(reversed(limits.items())))


class _Merged:
    """The bytes of `metrics.parquet`, a row group at a time; iterated again when a write is tried again."""

    def __init__(self, files: Files, survey: _Survey):
        self._files, self._survey = files, survey

    def __iter__(self) -> Iterator[bytes]:
        metadata = {MERGED_KEY: str(self._survey.next_part).encode()}
        return _encode(_read_tables(self._files, self._survey), metadata)


class _Sink(io.RawIOBase):
    """Takes what parquet's writer writes, to be handed on piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def drain(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def _encode(tables: Iterable[pa.Table], metadata: dict[bytes, bytes]) -> Iterator[bytes]:
    from pyarrow import parquet

    sink = _Sink()
    writer = parquet.ParquetWriter(
        sink,
        _schema().with_metadata(metadata),
        compression="zstd",
        use_dictionary=["name"],
        column_encoding=dict.fromkeys(("step", "epoch", "time"), "DELTA_BINARY_PACKED"),
    )
    with writer:
        for table in tables:
            writer.write_table(table)
            yield sink.drain()
    yield sink.drain()


@contextmanager
def _open(files: Files, path: str) -> Iterator[BinaryIO]:
    """A part is replaced while it grows, and so it is taken whole, at once. What the parquet reader stumbles over,
    other than storage, is damage."""
    from pyarrow.lib import ArrowException

    file = io.BytesIO(files.read_bytes(path)) if PART_NAME.fullmatch(path) else files.open_read(path)
    with file:
        try:
            yield file
        except StorageError:
            raise
        except (ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            text = str(error).strip() or type(error).__name__
            raise Damaged(path, text.splitlines()[0].rstrip(".")) from error


def _read_metadata(files: Files, path: str) -> dict[bytes, bytes]:
    from pyarrow import parquet

    with _open(files, path) as file:
        return parquet.read_schema(file).metadata or {}


def _number_in(metadata: dict[bytes, bytes], key: bytes, path: str) -> int:
    """0 if it is not there."""
    try:
        return int(metadata.get(key, 0))
    except ValueError as error:
        raise Damaged(path, f"{key.decode()} is no number") from error


def _read_tables(files: Files, survey: _Survey) -> Iterator[pa.Table]:
    for path, limit in survey.limits.items():
        for table in _read_file(files, path):
            yield table if limit is None else _filter_steps(table, limit)


def _read_file(files: Files, path: str) -> Iterator[pa.Table]:
    """One table a row group; whoever takes them raises nothing in between."""
    from pyarrow import parquet

    with _open(files, path) as file:
        source = parquet.ParquetFile(file)
        for number in range(source.num_row_groups):
            yield _checked(source.read_row_group(number))


def _checked(table: pa.Table) -> pa.Table:
    """Raises ValueError or what pyarrow does if it is not a table of the journal."""
    table = table.select(_schema().names).cast(_schema())
    table.validate(full=True)
    if any(column.null_count for column in table.columns) or any(
        chunk.dictionary.null_count for chunk in table["name"].chunks
    ):
        raise ValueError("a value is missing")
    return table


def _filter_steps(table: pa.Table, last_step: int) -> pa.Table:
    import pyarrow.compute as pc

    return table.filter(pc.less_equal(table["step"], last_step))


def _build_table(rows: list[tuple]) -> pa.Table:
    import pyarrow as pa

    flat = [
        (step, epoch, to_utf8(name), value, int(seconds * 1e6))
        for step, epoch, seconds, values in rows
        for name, value in values.items()
    ]
    steps, epochs, names, numbers, times = zip(*flat, strict=True) if flat else ((),) * 5
    columns = [steps, epochs, pa.array(names, pa.string()).dictionary_encode(), numbers, times]
    fields = zip(columns, _schema(), strict=True)
    return pa.table([pa.array(column, field.type) for column, field in fields], schema=_schema())


@lru_cache(maxsize=1)
def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("step", pa.int64()),
            ("epoch", pa.int64()),
            ("name", pa.dictionary(pa.int32(), pa.string())),
            ("value", pa.float64()),
            ("time", pa.timestamp("us", tz="UTC")),
        ]
    )
