"""Rows written by a thread, so that adding one costs the training loop a microsecond."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Row = TypeVar("Row")

logger = logging.getLogger("raylight")


class RowWriter(Generic[Row]):
    """Every `interval_s`, gives the rows added since to `take`, then calls `store`.

    `take` either takes all rows or raises before it took any; they are kept and offered again then. `store` brings
    the rows taken to storage and is called whether or not there are new ones, so it can make up for a failure.
    In the thread, errors are logged, once each, and tried again; `flush` and `close` raise them.
    """

    def __init__(self, name: str, take: Callable[[list[Row]], None], store: Callable[[], None], interval_s: float):
        self.name = name
        self.interval_s = interval_s
        self._take, self._store = take, store
        self._rows: deque[Row] = deque()
        self._writing = threading.RLock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_error = ""

    def add(self, row: Row) -> None:
        self._rows.append(row)
        self.start()

    def start(self) -> None:
        """Writes and stores from now on; the first row does so too."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"raylight-{self.name}", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Write now, in the calling thread; return once it is done."""
        with self._writing:
            rows = [self._rows.popleft() for _ in range(len(self._rows))]
            try:
                if rows:
                    self._take(rows)
            except BaseException:
                self._rows.extendleft(reversed(rows))
                raise
            self._store()

    def close(self) -> None:
        """Stop the thread and write what is left."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._closing.wait(self.interval_s):
            try:
                self.flush()
                self._last_error = ""
            except Exception as error:
                self._log_once(error)

    def _log_once(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text != self._last_error:
            self._last_error = text
            logger.warning("cannot write %s, will try again: %s", self.name, text)
