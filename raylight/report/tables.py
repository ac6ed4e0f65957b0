"""Output of `raylight runs`, `show`, `verify` and `doctor`: rich tables, and metrics as curves of one line."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape as escape_markup
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raylight.contract.plain_text import visible
from raylight.storage.checkpoints import Checkpoint
from raylight.storage.summaries import Summary

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40
SILENCE_S = 120.0
"""A running version that has written nothing for longer is shown as silent: its driver may be dead."""
STATUS_STYLES = {
    "running": "cyan", "finished": "green", "stopped": "green", "interrupted": "yellow", "failed": "red",
    "unreadable": "red", "claimed": "dim",
}  # fmt: skip


def escape(text: str) -> str:
    """Any text, safe in a cell."""
    return escape_markup(visible(text))


def runs_table(summaries: Sequence[Summary]) -> Table:
    """A line for each version; with a column of trials if there are any."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    has_trials = any(it.trial for it in summaries)
    columns = (
        ("run", "left"), ("version", "right"), *([("trial", "left")] if has_trials else []), ("status", "left"),
        ("best", "left"), ("step", "right"), ("started", "left"), ("duration", "right"), ("checkpoints", "right"),
        ("size", "right"),
    )  # fmt: skip
    for header, side in columns:
        table.add_column(header, justify="right" if side == "right" else "left", no_wrap=True)
    for it in summaries:
        table.add_row(
            escape(it.name),
            str(it.number),
            *([escape(it.trial or "-")] if has_trials else []),
            status_text(it),
            f"{escape(it.metric)} {number_text(it.value)}" if it.metric and it.value is not None else "-",
            "-" if it.step is None else str(it.step),
            time_text(it.started_at),
            duration_text(it.duration_s),
            str(it.num_checkpoints),
            size_text(it.size),
        )
    return table


def status_text(summary: Summary) -> Text:
    text = Text(visible(summary.status), STATUS_STYLES.get(summary.status, ""))
    if summary.silent_s is not None and summary.silent_s > SILENCE_S:
        text.append(f" (silent for {duration_text(summary.silent_s)})", "yellow")
    if summary.num_attempts > 1:
        text.append(f", attempt {summary.num_attempts}", "dim")
    return text


def run_view(
    summary: Summary,
    record: Mapping[str, Any],
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    checkpoints: Sequence[Checkpoint],
    best: Checkpoint | None,
    leftovers: Sequence[str] = (),
) -> RenderableType:
    """One version as a page."""
    parts: list[RenderableType] = [_heading(summary, record)]
    for title, values in (
        ("arguments", _given_arguments(record)),
        ("hyperparameters", record.get("hyperparameters") or {}),
        ("environment", _environment(record)),
        ("time went to", {name: duration_text(spent) for name, spent in (record.get("goodput") or {}).items()}),
    ):
        if values:
            parts += _section(title, pairs_table(values))
    if curves:
        parts += _section("metrics", curves_table(curves))
    if checkpoints or leftovers:
        parts += _section("checkpoints", checkpoints_table(checkpoints, best))
    if leftovers:
        parts.append(Text(f"  never committed: {visible(', '.join(leftovers))}", "yellow"))
    return Group(*parts)


def _heading(summary: Summary, record: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(visible(f"{summary.name} version {summary.number}"), "bold"), status_text(summary))
    table.add_row("path", Text(visible(summary.path), overflow="fold"))
    table.add_row("started", f"{time_text(summary.started_at)}, {duration_text(summary.duration_s)}")
    table.add_row("size", f"{size_text(summary.size)}, {count_text(summary.num_checkpoints, 'checkpoint')}")
    if record.get("error"):
        table.add_row("error", Text(visible(str(record["error"]), keep="\n"), "red", overflow="fold"))
    return table


def _given_arguments(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments as the user wrote them if that is recorded, otherwise all of them."""
    arguments = record.get("arguments") or {}
    given = arguments.get("given")
    return given if isinstance(given, Mapping) else arguments


def _environment(record: Mapping[str, Any]) -> dict[str, Any]:
    packages = record.get("packages") or {}
    values = {name: record.get(name) for name in ("python", "git_commit", "seed", "command", "world_size")}
    values["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    return {name: value for name, value in values.items() if value not in (None, "")}


def _section(title: str, content: RenderableType) -> list[RenderableType]:
    return [Text(), Text(title, "bold"), Padding(content, (0, 0, 0, 2))]


def pairs_table(values: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(escape(str(name)), Text(visible(value_text(value))))
    return table


def curves_table(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], width: int = CURVE_WIDTH) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True, style="cyan")
    for header in ("first", "last", "lowest", "highest", "values"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, (_, values) in curves.items():
        known = [value for value in values if not math.isnan(value)]
        ends = (min(known), max(known)) if known else (math.nan, math.nan)
        numbers = [number_text(value) for value in (values[0], values[-1], *ends)]
        table.add_row(escape(name), curve(values, width), *numbers, str(len(values)))
    return table


def curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Values in order as blocks of eight heights, each the mean of its share; "!" if none is finite."""
    width = min(width, len(values))
    shares = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    finite = [[value for value in share if math.isfinite(value)] for share in shares]
    means = [sum(share) / len(share) if share else math.nan for share in finite]
    known = [mean for mean in means if not math.isnan(mean)]
    if not known:
        return "!" * width
    low, span = min(known), max(known) - min(known)
    return "".join("!" if math.isnan(mean) else BLOCKS[_height(mean - low, span)] for mean in means)


def _height(above: float, span: float) -> int:
    return min(len(BLOCKS) - 1, int(above / span * len(BLOCKS))) if span > 0 else len(BLOCKS) // 2


def checkpoints_table(checkpoints: Sequence[Checkpoint], best: Checkpoint | None) -> Table:
    names = list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.metrics))[:4]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in ("", "epoch", "files", "size", *names, "written", ""):
        table.add_column(escape(header), no_wrap=True, justify="right" if header else "left")
    for index, it in enumerate(checkpoints):
        marks = ["best"] if best is not None and it.path == best.path else []
        marks += ["last"] if index == len(checkpoints) - 1 else []
        marks += ["weights only"] if it.manifest.weights_only else []
        values = [number_text(it.metrics.get(name)) for name in names]
        table.add_row(
            escape(it.name), str(it.epoch), str(len(it.file_names)), size_text(it.size), *values,
            time_text(it.manifest.time), Text(", ".join(marks), "green"),
        )  # fmt: skip
    return table


def verification_lines(results: Iterable[tuple[str, list[str]]]) -> Iterable[Text]:
    """One line a checkpoint, as it is found, and one more for each problem."""
    for path, problems in results:
        yield Text.assemble(("damaged  ", "bold red") if problems else ("whole    ", "green"), visible(path))
        for problem in problems:
            yield Text(f"         {visible(problem)}", "red")


def doctor_table(checks: Iterable[tuple[str, str, str]]) -> Table:
    """`checks`: state ("ok", "note", "bad"), what was looked at, what was found."""
    table = Table.grid(padding=(0, 2))
    marks = {"ok": ("✓", "green"), "note": ("·", "yellow"), "bad": ("✗", "bold red")}
    for state, name, found in checks:
        table.add_row(Text(*marks[state]), name, Text(visible(found, keep="\n"), overflow="fold"))
    return table


def value_text(value: Any) -> str:
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={value_text(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return " ".join(value_text(item) for item in value)
    return str(value)


def number_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def count_text(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def size_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def time_text(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
