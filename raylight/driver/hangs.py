"""Finding a rank that hangs, from signs of life alone: no collective, no thread, nothing of a backend."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

from raylight.contract.messages import Message, Progress, StageStarted

FLOOR_S = 300.0
"""A silence that is shorter is never taken for a hang, unless the user names `hang_timeout_s`."""
LONGEST_SILENCES = 20.0
"""Otherwise the limit is so many times the longest silence of this run that a sign of life has ended."""
PATIENCE_AT_FIRST = 10.0
"""So much longer may a start, the first batch of a loop and the hooks at the end take: data is fetched, models compile.
Of a first batch it holds until one has been seen: later ones, after a failure, may take so much longer than that."""
NEW_PROCESS_S = 10.0
"""That long at least: a new process imports more in its first batch than one that was kept from a run before."""
UNWATCHED = ("save",)
"""Storage may be away for long; its own retries are bounded."""

SAME_S = 0.01
"""Between two answers about one sign of life, for the way that they take."""

Beat = tuple[str, int, float]


class HangDetector:
    """Told from time to time what the ranks answer. A hang is when all that run are silent for too long: those that
    wait for the one that hangs fall silent with it, and while one makes progress, nobody is stuck for good."""

    def __init__(self, timeout_s: float | None, clock: Callable[[], float] = time.monotonic):
        self.timeout_s, self.clock = timeout_s, clock
        self.longest_s = 0.0
        self._longest_first_s: dict[str, float] = {}  # by stage
        self.begin()

    def begin(self) -> None:
        """A generation of the group begins; what was learnt of the run stays."""
        self._last: dict[int, Beat] = {}  # stage, step and moment of the newest sign of life
        self._began = self.clock()
        self._loops_began: dict[str, float] = {}  # by their first sign of life

    def look(self, ages: Mapping[int, tuple[str, int, float] | None]) -> bool:
        """Whether the ranks hang; `ages` as of RayGroup.ages, of those that have not finished."""
        now = self.clock()
        for rank, answer in ages.items():
            if answer is not None:
                self._note(rank, (answer[0], answer[1], now - answer[2]))
        return bool(ages) and all(self._is_silent(rank, now) for rank in ages)

    def see(self, message: Message) -> None:
        """Learns from what the ranks say how long a first batch takes: they are seldom asked, and it may be short."""
        if not isinstance(message, StageStarted | Progress):
            return
        first = "first training batch" if message.stage == "train" else f"first batch of {message.stage}"
        if isinstance(message, StageStarted):
            self._loops_began.setdefault(first, self.clock())
        elif first in self._loops_began:
            took_s = self.clock() - self._loops_began.pop(first)
            self._longest_first_s[first] = max(self._longest_first_s.get(first, 0.0), took_s)

    def _note(self, rank: int, beat: Beat) -> None:
        before = self._last.get(rank)
        if before is not None and beat[:2] == before[:2] and beat[2] - before[2] < SAME_S:
            return
        if before is not None and not _takes_longer(before[0]):
            self.longest_s = max(self.longest_s, beat[2] - before[2])
        self._last[rank] = beat

    def _is_silent(self, rank: int, now: float) -> bool:
        stage, _, moment = self._last.get(rank, ("start", 0, self._began))
        if stage in UNWATCHED:
            return False
        limit = self.timeout_s if self.timeout_s is not None else max(FLOOR_S, LONGEST_SILENCES * self.longest_s)
        if _takes_longer(stage):
            seen_s = self._longest_first_s.get(stage, limit)
            limit = max(limit, min(PATIENCE_AT_FIRST * limit, max(PATIENCE_AT_FIRST * seen_s, NEW_PROCESS_S)))
        if stage in ("start", "end"):  # a process comes up, and the user's own set-up runs, or what he does at the end
            limit = max(limit, FLOOR_S)
        return now - moment > limit

    def find_stuck(self, stacks: Mapping[int, str]) -> tuple[int, str, int]:
        """The rank that the others wait for, what is known of it, and its step. One that is not inside torch, where a
        rank waits for its peers, is to blame before one that is; then the one with the lowest step."""

        def order(rank: int) -> tuple[bool, int, float]:
            _, step, moment = self._last.get(rank, ("", -1, 0.0))
            return waits_for_peers(stacks[rank]), step, moment

        rank = min(stacks, key=order)
        stage, step, moment = self._last.get(rank, ("start", 0, self.clock()))
        return rank, f"no sign of life for {self.clock() - moment:.1f} s in {stage} at step {step}", step


def _takes_longer(stage: str) -> bool:
    return stage in ("start", "end") or stage.startswith("first")


def waits_for_peers(stack: str) -> bool:
    """Whether the loop's thread, of all threads in `stack`, is inside torch or raylight's own waiting."""
    loops = [part for part in stack.split("\n\n") if "worker/task_runner.py" in part]
    files = re.findall(r'File "([^"]+)"', loops[0] if loops else "")
    return bool(files) and re.search(r"/(torch|raylight)/", files[-1]) is not None


def format_stacks(stacks: Mapping[int, str]) -> str:
    return "\n".join(f"---- rank {rank}\n{stack.rstrip()}" for rank, stack in sorted(stacks.items()))
