"""The live table of a sweep: trials, their state and metric, the best so far, the time that is left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylight.contract.plain_text import visible
from raylight.report.summary import format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

MAX_ROWS = 16
"""Rows of the table; in a larger sweep, the running trials, then the best."""
STATES = ("running", "paused", "waiting", "done", "failed")
_STYLES = {"running": "cyan", "paused": "yellow", "waiting": "dim", "failed": "red"}


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial now. `value` is the newest of the metric and `best` the best so far; None before the first result."""

    name: str
    state: str
    config: Mapping[str, Any]
    value: float | None = None
    best: float | None = None
    epoch: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SweepState:
    """All trials now. `total` also counts those to come; `left_s` is None if unknown."""

    rows: Sequence[TrialRow]
    total: int
    metric: str
    mode: str
    elapsed_s: float
    left_s: float | None

    @property
    def best(self) -> TrialRow | None:
        known = [row for row in self.rows if is_known(row.best)]
        return min(known, key=self.order, default=None)

    def order(self, row: TrialRow) -> float:
        """A sort key: smaller is better, trials without a value come last."""
        if not is_known(row.best):
            return math.inf
        assert row.best is not None
        return row.best if self.mode == "min" else -row.best


def is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def describe(state: SweepState) -> str:
    """The line above the table, and all that a log file gets."""
    counts = Counter(row.state for row in state.rows)
    waiting = state.total - len(state.rows) + counts["waiting"]
    counts["waiting"] = max(waiting, 0)
    parts = [f"{state.total} trials: " + ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])]
    if state.best is not None:
        parts.append(f"best {visible(state.metric)} {format_number(state.best.best)} ({visible(state.best.name)})")
    parts.append(format_seconds(state.elapsed_s))
    if state.left_s is not None and counts["running"] + counts["waiting"] + counts["paused"]:
        parts.append(f"about {format_seconds(state.left_s)} left")
    return ", ".join(parts)


def render(state: SweepState, width: int, ascii_only: bool = False) -> RenderableType:
    """The line and the table below it, as wide as `width` allows."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(key for row in state.rows for key in row.config))
    table = Table(box=box.ASCII2 if ascii_only else box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for header in ("trial", "state", "epoch", state.metric, "best", "time", *names):
        side: Any = "left" if header in ("trial", "state") else "right"
        table.add_column(Text(visible(header)), justify=side, no_wrap=True)
    best = state.best
    for row in choose_rows(state):
        style = "bold green" if row is best else _STYLES.get(row.state, "")
        cells = [row.name, row.state, "-" if row.epoch is None else str(row.epoch)]
        cells += [format_number(row.value), format_number(row.best), format_seconds(row.seconds)]
        cells += [format_setting(row.config.get(name)) for name in names]
        table.add_row(*(Text(visible(cell)) for cell in cells), style=style)
    hidden = len(state.rows) - min(len(state.rows), MAX_ROWS)
    more = [Text(f"and {hidden} more", "dim")] if hidden else []
    return Group(Text(describe(state), "bold", overflow="ellipsis", no_wrap=True), table, *more)


def choose_rows(state: SweepState) -> list[TrialRow]:
    """The running trials, then the best of the others; all in their order if there is room."""
    if len(state.rows) <= MAX_ROWS:
        return list(state.rows)
    running = [row for row in state.rows if row.state == "running"]
    others = sorted((row for row in state.rows if row.state != "running"), key=state.order)
    best = [state.best] if state.best is not None and state.best not in running else []
    return [*best, *running, *(row for row in others if row not in best)][:MAX_ROWS]


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def format_setting(value: Any) -> str:
    """A hyperparameter in a cell."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else visible(str(value))
    return text if len(text) <= 24 else f"{text[:21]}..."
