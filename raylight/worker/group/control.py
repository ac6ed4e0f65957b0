"""Control: the driver's way to act on a rank that is training, without a collective and without a cost per step."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from raylight.contract.requests import Request
from raylight.worker.diagnosis.failure import is_users

_NEVER = sys.maxsize
_AT_ONCE = -sys.maxsize


class Halted(Exception):
    """Raised in a rank's own loop because the driver told it to leave. `broken` says that the process group is gone
    and the rank should keep its state for the next one; otherwise it should just end."""

    def __init__(self, reason: str, broken: bool = False):
        super().__init__(reason)
        self.reason, self.broken = reason, broken


@dataclass(frozen=True, slots=True)
class Action:
    """What all ranks do at the same step boundary."""

    request: Request
    step: int
    """The boundary it was agreed for."""


class Beat(NamedTuple):
    """The last sign of life of a rank's loop."""

    stage: str
    step: int
    time: float
    """On the clock of `time.monotonic`."""


class Control:
    """One rank's end of it. The loop calls `tick`, a second thread (or a signal handler) all the rest.

    To make all ranks act at one boundary the driver calls `hold` on each, takes the largest answer, and calls
    `release` with it on each. A rank that reaches the boundary it answered waits there for the release, so none can
    pass the boundary that is chosen in the end.
    """

    def __init__(self) -> None:
        self.kept: object | None = None
        """What a rank keeps from one generation of the group to the next; worker/task_runner.py knows its type."""
        self.exception: BaseException | None = None
        """What ended a rank in this process, with its real traceback."""
        self.beat: tuple[str, int, float] = Beat("start", 0, time.monotonic())
        self.step = -1
        self._next = _NEVER  # the boundary at which `tick` has to look closer
        self._held: int | None = None
        self._actions: list[Action] = []
        self._requests: deque[Action] = deque()
        self._halted: Halted | None = None
        self._is_paused = False
        self._changed = threading.Condition()

    # ---- the loop's thread

    def tick(self, step: int) -> Action | None:
        """Called at every step boundary, with numbers that grow and are the same on every rank."""
        self.step = step
        if step < self._next:
            return None
        return self._look(step)

    def show_life(self, stage: str, step: int) -> None:
        """A sign of life, at each place where the loop may stand for long."""
        self.beat = (stage, step, time.monotonic())

    def show_life_again(self) -> None:
        """In the same stage and step as the sign before."""
        stage, step, _ = self.beat
        self.show_life(stage, step)

    def keep(self, kept: object | None) -> None:
        """For the next generation of the group; None forgets."""
        self.kept = kept

    def note_exception(self, error: BaseException) -> None:
        self.exception = error

    def check(self) -> None:
        """Raises Halted where the rank was told to leave; for places where going on would use a broken collective."""
        if self._halted is not None:
            raise self._halted

    def pause(self) -> None:
        """The next `stand_still` waits."""
        with self._changed:
            self._is_paused = True

    def stand_still(self) -> None:
        """Waits for `go_on`. A rank that does shows that it is alive."""
        with self._changed:
            while self._is_paused and self._halted is None:
                stage, step, _ = self.beat
                self.beat = Beat(stage, step, time.monotonic())
                self._changed.wait(timeout=1.0)
            self.check()

    @property
    def pending(self) -> Action | None:
        """What was asked for and has not been done yet. A long evaluation may cut itself short for it."""
        if self._next == _NEVER:
            return None
        with self._changed:
            return self._requests[0] if self._requests else self._actions[0] if self._actions else None

    def _look(self, step: int) -> Action | None:
        with self._changed:
            while self._held is not None and self._held <= step and self._halted is None:
                self._changed.wait()
            self.check()
            due = next((action for action in self._actions if action.step <= step), None)
            if due is not None:
                self._actions.remove(due)
            elif self._requests:
                due = self._requests.popleft()
            self._plan()
            return due

    def _plan(self) -> None:
        boundaries = [action.step for action in self._actions]
        if self._held is not None:
            boundaries.append(self._held)
        self._next = min(boundaries, default=_NEVER)
        # Last, because a signal handler may have added one since the line above was computed.
        if self._requests or self._halted is not None:
            self._next = _AT_ONCE

    # ---- the driver's thread

    def hold(self) -> int:
        """The first boundary that this rank has not passed yet; it waits there until `release`."""
        with self._changed:
            if self._held is None:
                # A tick first writes `step` and then reads `_next`; here it is the other way round. So either that
                # tick sees this and waits for the lock, or its step is seen below.
                self._next = _AT_ONCE
                self._held = self.step + 1
                self._plan()
            return self._held

    def release(self, step: int, request: Request | None = None) -> None:
        """Lets a held rank go on, and do as requested at boundary `step`; with no request it just goes on."""
        with self._changed:
            self._held = None
            if request is not None:
                self._actions.append(Action(request, step))
                self._is_paused = self._is_paused or request == Request.PAUSE
            self._plan()
            self._changed.notify_all()

    def go_on(self) -> None:
        """Ends a "pause", also one whose boundary has not been reached yet."""
        with self._changed:
            self._is_paused = False
            self._actions = [action for action in self._actions if action.request != Request.PAUSE]
            self._plan()
            self._changed.notify_all()

    def request(self, request: Request) -> None:
        """Acts at this rank's next boundary. For a group of one: it agrees with nobody. Safe in a signal handler."""
        self._requests.append(Action(request, self.step + 1))
        self._next = _AT_ONCE

    def stop_now(self, reason: str = "stopped at once") -> None:
        """The next `tick` or `check` raises Halted, and a rank that waits in `tick` raises at once."""
        self._halt(Halted(reason))

    def abort(self, reason: str) -> None:
        """As `stop_now`, and tells the rank that its process group is broken but its state is wanted."""
        self._halt(Halted(reason, broken=True))

    def resume(self) -> None:
        """Forgets what was told to the generation before; `kept` stays."""
        with self._changed:
            self._halted, self._held, self._is_paused = None, None, False
            self._actions.clear()
            self._requests.clear()
            self.step = -1
            self.beat = Beat("start", self.beat[1], time.monotonic())
            self._plan()

    def _halt(self, halted: Halted) -> None:
        with self._changed:
            self._halted = halted
            self._plan()
            self._changed.notify_all()

    # ---- looking on

    def age(self) -> tuple[str, int, float]:
        """Stage, step, and how many seconds ago the loop gave its last sign of life."""
        stage, step, moment = self.beat
        return stage, step, time.monotonic() - moment

    def stacks(self) -> str:
        """The Python stack of the loop's thread, then of those with user code; innermost frame last."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        loops, users, num_others = [], [], 0
        for ident, frame in sys._current_frames().items():
            stack = traceback.extract_stack(frame)
            part = f"Thread {names.get(ident, '(not started by Python)')}:\n{''.join(stack.format())}"
            if any(line.filename.endswith("worker/task_runner.py") for line in stack):
                loops.append(part)
            elif any(is_users(line.filename) for line in stack):
                users.append(part)
            else:
                num_others += 1
        return "\n".join([*loops, *users, f"{num_others} threads of libraries\n"])
