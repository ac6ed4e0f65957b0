"""An outage of a store: waited for once, by all that use the store together."""

from __future__ import annotations

import threading
import time


class Outage:
    """What the operations on one store know of each other; they may be of several threads. It is given up once an
    operation has made all its tries and nothing else answers either. From then on an operation has one try, and for a
    while after a slow one none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._began: float | None = None
        self._next_try = 0.0
        self.is_given_up = False
        self.error: OSError | None = None
        """The last that an operation has met in it."""

    def may_try(self) -> bool:
        """Whether an operation may be tried; False where it would only wait for what is known."""
        return not self.is_given_up or time.monotonic() >= self._next_try

    def note_failure(self, error: OSError) -> bool:
        """True where the outage begins with this one."""
        with self._changed:
            self.error = error
            begins = self._began is None
            if self._began is None:
                self._began = time.monotonic()
            return begins

    def note_answer(self) -> float:
        """It is over, if it was one. Returns how many seconds it lasted."""
        if self._began is None:
            return 0.0
        with self._changed:
            began, self._began, self.is_given_up = self._began, None, False
            self._changed.notify_all()
            return time.monotonic() - began if began is not None else 0.0

    def give_up(self, pause_s: float) -> bool:
        """For the next `pause_s` nothing is tried. True where it was not given up before."""
        with self._changed:
            is_new, self.is_given_up = not self.is_given_up, True
            self._next_try = time.monotonic() + pause_s
            self._changed.notify_all()
            return is_new

    def wait(self, seconds: float) -> None:
        """Until the next try of an operation, or until another one has found out how it stands."""
        with self._changed:
            was_given_up = self.is_given_up
            self._changed.wait_for(lambda: self._began is None or self.is_given_up is not was_given_up, seconds)

    @property
    def lasted_s(self) -> float:
        return time.monotonic() - self._began if self._began is not None else 0.0
