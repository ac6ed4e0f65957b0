"""Step values of all ranks merged into one row a step."""

from __future__ import annotations

from collections.abc import Collection

from raylight.contract.messages import StepMetrics, StepRow, StepValue

Row = tuple[int, int, float, dict[str, float]]
"""(step, epoch, seconds since 1970, values by name)"""

MAX_PENDING = 10_000
"""Steps that may wait for slow ranks; beyond it the oldest is given out with the ranks it has."""


def say_incomplete(steps: list[int], gone: Collection[int]) -> str:
    """The text for rows that lack the share of ranks that are gone."""
    which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    ranks, their = ("rank", "its") if len(gone) == 1 else ("ranks", "their")
    return (
        f"what was logged in {which} is that of the other ranks alone: {ranks} {', '.join(map(str, sorted(gone)))} "
        f"ended before saying {their} part"
    )


class _Pending:
    """One step, as far as ranks have sent it. `values` holds [sum or extreme, weight] by name."""

    __slots__ = ("epoch", "expected", "ranks", "reduce", "time", "values")

    def __init__(self, epoch: int, expected: int):
        self.epoch = epoch
        self.expected = expected  # how many ranks have a share in it
        self.time = 0.0
        self.ranks: list[int] = []  # those whose share is in it, as they were numbered when they sent it
        self.values: dict[str, list[float]] = {}
        self.reduce: dict[str, str] = {}

    def merge(self, rank: int, row: StepRow) -> None:
        self.ranks.append(rank)
        self.time = max(self.time, row.time)
        for name, sent in row.values.items():
            held = self.values.get(name)
            if held is None:
                self.reduce[name] = sent.reduce
                self.values[name] = [sent.value * sent.weight if sent.reduce == "mean" else sent.value, sent.weight]
            else:
                _merge_value(held, sent)

    def finish(self) -> dict[str, float]:
        return {
            name: _divide(total, weight) if self.reduce[name] == "mean" else total
            for name, (total, weight) in self.values.items()
        }


def _merge_value(held: list[float], sent: StepValue) -> None:
    if sent.reduce == "mean":
        held[0] += sent.value * sent.weight
        held[1] += sent.weight
    elif sent.reduce == "sum":
        held[0] += sent.value
    elif sent.value != sent.value:  # a NaN on any rank is the answer; min and max of Python would hide it
        held[0] = sent.value
    elif sent.reduce == "min":
        held[0] = sent.value if sent.value < held[0] else held[0]
    elif sent.reduce == "max":
        held[0] = sent.value if sent.value > held[0] else held[0]
    else:
        raise ValueError(f"step values are merged by mean, sum, min or max, not by {sent.reduce!r}")


def _divide(total: float, weight: float) -> float:
    return total / weight if weight else float("nan")


class StepAggregator:
    """Merges the `StepMetrics` of `world_size` ranks; a row comes out once every rank has sent its step.

    Ranks send steps in rising order, so rows come out in rising order. A step that a rank sends again, or sends
    after the row was given out, is ignored. A row comes out once, through failures and regroupings too.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._pending: dict[int, _Pending] = {}
        self._last_step: dict[int, int] = {}  # by rank
        self._done_step = -1

    def add(self, rank: int, message: StepMetrics) -> list[Row]:
        if self.world_size == 1 and not self._pending:
            return self._pass_on(message)
        complete: list[Row] = []
        for row in message.rows:
            if row.step <= self._last_step.get(rank, -1) or row.step <= self._done_step:
                continue
            self._last_step[rank] = row.step
            pending = self._pending.get(row.step)
            if pending is None:
                pending = self._pending[row.step] = _Pending(row.epoch, self.world_size)
            pending.merge(rank, row)
            if len(pending.ranks) == pending.expected:
                complete += self._take_up_to(row.step)
        while len(self._pending) > MAX_PENDING:
            complete.append(self._take(next(iter(self._pending))))
        return complete

    def flush(self) -> list[Row]:
        """Rows that some ranks never sent, merged over those that did."""
        return [self._take(step) for step in sorted(self._pending)]

    def regroup(self, world_size: int, gone: Collection[int], last_step: int) -> tuple[list[Row], list[int]]:
        """Go on with `world_size` ranks after the step `last_step`, without the ranks in `gone`.

        Returns the rows that nobody will add to any more, and which of their steps lack the share of a rank that is
        gone. Steps beyond `last_step` will be sent again by all. A rank that is left may still bring its share of that
        step, before it sends a later one.
        """
        self.world_size = world_size
        self._last_step.clear()
        self._done_step = min(self._done_step, last_step)
        self._pending = {step: self._pending[step] for step in sorted(self._pending) if step <= last_step}
        incomplete = []
        for step, pending in self._pending.items():
            missing = set(gone).difference(pending.ranks)
            pending.expected -= len(missing)
            incomplete += [step] if missing else []
        whole = [step for step, pending in self._pending.items() if len(pending.ranks) >= pending.expected]
        return (self._take_up_to(whole[-1]) if whole else []), incomplete

    def redo(self, world_size: int, last_step: int) -> list[Row]:
        """Go on with ranks that begin after the step `last_step`; what others left of the steps up to it comes out."""
        rows, _ = self.regroup(world_size, (), last_step)
        return rows + self.flush()

    def _pass_on(self, message: StepMetrics) -> list[Row]:
        rows = [row for row in message.rows if row.step > self._done_step]
        if rows:
            self._done_step = rows[-1].step
        return [(row.step, row.epoch, row.time, {name: v.value for name, v in row.values.items()}) for row in rows]

    def _take_up_to(self, step: int) -> list[Row]:
        """The complete row of `step`, after older ones: all ranks are past those, so they stay incomplete."""
        older = []
        while (first := next(iter(self._pending))) < step:
            older.append(self._take(first))
        return [*older, self._take(step)]

    def _take(self, step: int) -> Row:
        pending = self._pending.pop(step)
        self._done_step = max(self._done_step, step)
        return step, pending.epoch, pending.time, pending.finish()
