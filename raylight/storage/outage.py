"""An outage of a store, for which all its users wait together, once."""

from __future__ import annotations

import threading
import time


class Outage:
    """The state that operations on one store share, from any thread. The store is given up once an operation has made
    all its tries and nothing else answers either. From then on an operation has one try, and none for a while after a
    slow one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._began: float | None = None
        self._next_try = 0.0
        self.is_given_up = False
        self.error: OSError | None = None
        """The newest error of the outage."""

    def may_try(self) -> bool:
        """Whether an operation may be tried; False if it would only wait for a known failure."""
        return not self.is_given_up or time.monotonic() >= self._next_try

    def note_failure(self, error: OSError) -> bool:
        """Returns True if the outage begins with this failure."""
        with self._changed:
            self.error = error
            begins = self._began is None
            if self._began is None:
                self._began = time.monotonic()
            return begins

    def note_answer(self) -> float:
        """Ends the outage, if there was one. Returns how many seconds it lasted."""
        if self._began is None:
            return 0.0
        with self._changed:
            began, self._began, self.is_given_up = self._began, None, False
            self._changed.notify_all()
            return time.monotonic() - began if began is not None else 0.0

    def give_up(self, pause_s: float) -> bool:
        """Lets nothing be tried for the next `pause_s`. Returns True if the store was not given up before."""
        with self._changed:
            is_new, self.is_given_up = not self.is_given_up, True
            self._next_try = time.monotonic() + pause_s
            self._changed.notify_all()
            return is_new

    def wait(self, seconds: float) -> None:
        """Waits for the next try of an operation, or until another operation has found out how the store stands."""
        with self._changed:
            was_given_up = self.is_given_up
            self._changed.wait_for(lambda: self._began is None or self.is_given_up is not was_given_up, seconds)

    @property
    def lasted_s(self) -> float:
        return time.monotonic() - self._began if self._began is not None else 0.0
