"""The lines of a run that goes on: one for each loop over data, with or without a bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylight.contract.plain_text import visible
from raylight.report.summary import format_seconds, format_value

if TYPE_CHECKING:
    from rich.text import Text

    from raylight.report.progress import RunProgress, Stage

MIN_BAR_WIDTH, MAX_BAR_WIDTH = 10, 40


def describe(progress: RunProgress, now: float) -> list[tuple[Stage, list[str]]]:
    """Each loop under way and its text, the outer one first; values go with the outer one."""
    lines = [(stage, _describe_stage(progress, stage)) for stage in progress.stages.values()]
    if lines:
        left = progress.time_left_s(now)
        lines[0][1].extend([f"{format_seconds(left)} left"] if left is not None else [])
        lines[0][1].extend(f"{visible(name)} {format_value(value)}" for name, value in progress.values.items())
    return lines


def _describe_stage(progress: RunProgress, stage: Stage) -> list[str]:
    total = f"/{stage.num_batches:,}" if stage.num_batches is not None else ""
    parts = [f"{stage.num_done:,}{total}"]
    if stage.name == "train":
        parts.append(f"step {progress.step:,}")
    if stage.rate.value is not None:
        parts.append(f"{format_rate(stage.rate.value)} samples/s")
    return parts


def label(progress: RunProgress, stage: Stage) -> str:
    if stage.name != "train":
        return stage.name
    return f"epoch {stage.epoch + 1}" + (f"/{progress.max_epochs}" if progress.max_epochs else "")


def format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def render(progress: RunProgress, now: float, width: int, ascii_only: bool = False) -> Text:
    """A line for each loop: its name, a bar, and its text."""
    from rich.text import Text

    lines = describe(progress, now)
    labels = [label(progress, stage) for stage, _ in lines]
    label_width = max(map(len, labels), default=0)
    longest = max((len("  ".join(parts)) for _, parts in lines), default=0)
    bar_width = max(MIN_BAR_WIDTH, min(MAX_BAR_WIDTH, width - label_width - longest - 4))
    text = Text(no_wrap=True, overflow="ellipsis")
    for name, (stage, parts) in zip(labels, lines, strict=True):
        text.append("\n" if text else "").append(name.ljust(label_width), style="bold").append("  ")
        _append_bar(text, stage.fraction, bar_width, ascii_only)
        text.append("  ").append(parts[0], style="green").append("  " + "  ".join(parts[1:]))
    return text


def _append_bar(text: Text, fraction: float | None, width: int, ascii_only: bool) -> None:
    full, empty = ("#", "-") if ascii_only else ("━", "━")
    num_full = int((fraction or 0.0) * width)
    text.append(full * num_full, style="cyan" if num_full < width else "green")
    text.append(empty * (width - num_full), style="bright_black")
