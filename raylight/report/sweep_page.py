"""A sweep as one HTML page: parallel coordinates, the metric against each hyperparameter, and all trials."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from raylight.report.sweep_table import SweepState, TrialRow, format_number, format_setting, is_known

WIDTH, HEIGHT, MARGIN = 1000, 380, 70
PLOT_WIDTH, PLOT_HEIGHT = 300, 210
MAX_TICKS = 4
# From the best to the worst, in colours that the colour-blind can distinguish.
_COLORS = ((35, 80, 190), (60, 170, 190), (225, 190, 90))

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2rem auto; max-width: 1040px; color: #222; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin-top: 2rem; }
svg { overflow: visible; } svg text { font-size: 11px; fill: #444; stroke: #fff; stroke-width: 3px; paint-order: stroke;
pointer-events: none; } .axis { stroke: #999; }
polyline { fill: none; stroke-width: 1.5; opacity: .75; } polyline:hover { stroke-width: 4; opacity: 1; }
circle { opacity: .85; } circle:hover { stroke: #000; } .plots { display: flex; flex-wrap: wrap; gap: 24px; }
table { border-collapse: collapse; } th { border-bottom: 1px solid #999; }
td, th { padding: 2px 12px 2px 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
"""  # fmt: skip


@dataclass(frozen=True, slots=True)
class Axis:
    """One hyperparameter or the metric: `place` maps a value to 0 (low) .. 1 (high)."""

    name: str
    place: Callable[[Any], float]
    ticks: Sequence[tuple[str, float]]
    is_log: bool = False

    @property
    def title(self) -> str:
        return f"{self.name} (log)" if self.is_log else self.name


def make_page(state: SweepState, title: str) -> str:
    """One file without scripts that any browser shows; a trial's settings appear under the pointer."""
    rows = sorted((row for row in state.rows if is_known(row.best) and math.isfinite(row.best or 0.0)), key=state.order)
    names = varied_names(state.rows)
    metric = make_axis(state.metric, [row.best for row in rows])
    axes = [make_axis(name, [row.config.get(name) for row in rows]) for name in names]
    aim = f"{len(state.rows)} trials, the {state.mode}imum of {escape(state.metric)} is the best"
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{aim}</p>"]
    if rows and axes:
        parts += ["<h2>each line is a trial, the best are blue</h2>", _parallel_coordinates(rows, [*axes, metric])]
        plots = "".join(_scatter(rows, axis, metric) for axis in axes)
        parts += [f"<h2>{escape(state.metric)} against each hyperparameter</h2>", f'<div class="plots">{plots}</div>']
    parts += ["<h2>trials</h2>", _table(sorted(state.rows, key=state.order), names, state.metric)]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return head + "\n".join(parts) + "</html>\n"


def varied_names(rows: Sequence[TrialRow]) -> list[str]:
    """Hyperparameters that are not the same in all trials."""
    names = dict.fromkeys(name for row in rows for name in row.config)
    return [name for name in names if len({repr(row.config.get(name)) for row in rows}) > 1]


def make_axis(name: str, values: Sequence[Any]) -> Axis:
    """An axis with numbers by size, other values by name. The scale is logarithmic if numbers span more than a factor
    of 50 and most are small: the smallest of a uniform draw may be tiny too."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    if len(numbers) < len(values) or not numbers:
        labels = sorted({format_setting(value) for value in values})
        positions = {label: (index + 0.5) / len(labels) for index, label in enumerate(labels)}
        return Axis(name, lambda value: positions[format_setting(value)], list(positions.items()))
    low, high = min(numbers), max(numbers)
    is_log = low > 0 and high / low > 50 and statistics.median(numbers) < low + (high - low) / 4
    scale: Callable[[float], float] = math.log if is_log else float
    span = scale(high) - scale(low)

    def place(value: Any) -> float:
        return (scale(value) - scale(low)) / span if span else 0.5

    middle = (low * high) ** 0.5 if is_log else (low + high) / 2
    distinct = sorted(set(numbers))
    shown = distinct if len(distinct) <= MAX_TICKS and not is_log else [low, middle, high]
    ticks = [(format_number(value), place(value)) for value in shown]
    return Axis(name, place, ticks, is_log)


def _parallel_coordinates(rows: list[TrialRow], axes: list[Axis]) -> str:
    step = (WIDTH - 2 * MARGIN) / (len(axes) - 1)
    top, bottom = 30, HEIGHT - 30
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%">']
    for index, row in reversed(list(enumerate(rows))):  # the best on top
        values = [*(row.config.get(axis.name) for axis in axes[:-1]), row.best]
        places = [axis.place(value) for axis, value in zip(axes, values, strict=True)]
        points = " ".join(f"{MARGIN + i * step:.1f},{bottom - at * (bottom - top):.1f}" for i, at in enumerate(places))
        line = f'<polyline points="{points}" stroke="{_color(index, len(rows))}">'
        parts.append(f"{line}{_hint(row, axes[-1].name)}</polyline>")
    for index, axis in enumerate(axes):
        x = MARGIN + index * step
        parts += [_line(x, x, top, bottom), _text(x, 14, "middle", axis.title, is_bold=True)]
        parts += [_text(x - 6, bottom - at * (bottom - top) + 4, "end", label) for label, at in axis.ticks]
    return "".join(parts) + "</svg>"


def _scatter(rows: list[TrialRow], axis: Axis, metric: Axis) -> str:
    left, top, width, height = 50, 10, PLOT_WIDTH - 60, PLOT_HEIGHT - 50
    bottom = top + height
    parts = [f'<svg width="{PLOT_WIDTH}" height="{PLOT_HEIGHT}">']
    parts += [_line(left, left + width, bottom, bottom), _line(left, left, top, bottom)]
    parts += [_text(left - 6, bottom - at * height + 4, "end", label) for label, at in metric.ticks]
    parts += [_text(left + at * width, bottom + 15, "middle", label) for label, at in axis.ticks]
    parts.append(_text(left + width / 2, bottom + 32, "middle", axis.title, is_bold=True))
    for index, row in reversed(list(enumerate(rows))):
        x, y = left + axis.place(row.config.get(axis.name)) * width, bottom - metric.place(row.best) * height
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{_color(index, len(rows))}">'
        parts.append(f"{dot}{_hint(row, metric.name)}</circle>")
    return "".join(parts) + "</svg>"


def _line(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="axis" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, anchor: str, text: str, is_bold: bool = False) -> str:
    weight = ' font-weight="bold"' if is_bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _table(rows: Sequence[TrialRow], names: Sequence[str], metric: str) -> str:
    header = "".join(f"<th>{escape(text)}</th>" for text in ("trial", "state", "epoch", metric, *names))
    lines = [
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in (
            row.name, row.state, "-" if row.epoch is None else row.epoch, format_number(row.best),
            *(format_setting(row.config.get(name)) for name in names),
        )) + "</tr>"
        for row in rows
    ]  # fmt: skip
    return f"<table><tr>{header}</tr>{''.join(lines)}</table>"


def _hint(row: TrialRow, metric: str) -> str:
    settings = (f"{name}: {format_setting(value)}" for name, value in row.config.items())
    text = "\n".join([row.name, f"{metric}: {format_number(row.best)}", *settings])
    return f"<title>{escape(text)}</title>"


def _color(index: int, count: int) -> str:
    position = index / max(count - 1, 1) * (len(_COLORS) - 1)
    first = min(int(position), len(_COLORS) - 2)
    share = position - first
    mixed = (round(a + (b - a) * share) for a, b in zip(_COLORS[first], _COLORS[first + 1], strict=True))
    return f"rgb({','.join(map(str, mixed))})"
