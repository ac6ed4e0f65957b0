"""Step values of all ranks merged into one row a step."""

from __future__ import annotations

from raylight.contract.messages import StepMetrics, StepRow, StepValue

Row = tuple[int, int, float, dict[str, float]]
"""(step, epoch, seconds since 1970, values by name)"""

MAX_PENDING = 10_000
"""Steps that may wait for slow ranks; beyond it the oldest is given out with the ranks it has."""


class _Pending:
    """One step, as far as ranks have sent it. `values` holds [sum or extreme, weight] by name."""

    __slots__ = ("epoch", "num_ranks", "reduce", "time", "values")

    def __init__(self, epoch: int):
        self.epoch = epoch
        self.time = 0.0
        self.num_ranks = 0
        self.values: dict[str, list[float]] = {}
        self.reduce: dict[str, str] = {}

    def merge(self, row: StepRow) -> None:
        self.num_ranks += 1
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
    after the row was given out, is ignored.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._pending: dict[int, _Pending] = {}
        self._last_step: dict[int, int] = {}  # by rank
        self._done_step = -1

    def add(self, rank: int, message: StepMetrics) -> list[Row]:
        if self.world_size == 1:
            return self._pass_on(message)
        complete: list[Row] = []
        for row in message.rows:
            if row.step <= self._last_step.get(rank, -1) or row.step <= self._done_step:
                continue
            self._last_step[rank] = row.step
            pending = self._pending.get(row.step)
            if pending is None:
                pending = self._pending[row.step] = _Pending(row.epoch)
            pending.merge(row)
            if pending.num_ranks == self.world_size:
                complete += self._take_up_to(row.step)
        while len(self._pending) > MAX_PENDING:
            complete.append(self._take(next(iter(self._pending))))
        return complete

    def flush(self) -> list[Row]:
        """Rows that some ranks never sent, merged over those that did."""
        return [self._take(step) for step in sorted(self._pending)]

    def resize(self, world_size: int) -> list[Row]:
        """Begin an attempt with `world_size` ranks, which may redo steps; what the last one left comes out."""
        left = self.flush()
        self.world_size = world_size
        self._last_step.clear()
        self._done_step = -1
        return left

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
