"""Tables of plain text: the model before a run, its values after."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from raylight.contract.plain_text import visible

if TYPE_CHECKING:
    import torch

    from raylight.driver.result import Result

MAX_LAYERS = 40


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[str] | None = None) -> str:
    """Columns under `header`, `last` below a second rule. Texts are aligned left, numbers right."""
    every = [header, *rows, *([last] if last is not None else [])]
    widths = [max(len(row[column]) for row in every) for column in range(len(header))]
    right = [all(_looks_numeric(row[column]) for row in every[1:]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        return ("  " + "   ".join(cells)).rstrip()

    rule = " " + "─" * (sum(widths) + 3 * (len(widths) - 1) + 2)
    below = [rule, line(last)] if last is not None else []
    return "\n".join([line(header), rule, *map(line, rows), *below])


def summarize_model(module: torch.nn.Module) -> str:
    """The layers directly inside `module`: parameters, trainable ones, and megabytes with buffers.

    The last line counts what layers share once. Lazy parameters show as "?" until a first batch gives them a shape.
    """
    rows = [
        _model_row(visible(name), type(layer).__name__, layer.parameters(), layer.buffers())
        for name, layer in module.named_children()
    ]
    if any(True for _ in module.parameters(recurse=False)):
        own = module.parameters(recurse=False), module.buffers(recurse=False)
        rows.append(_model_row("", "Parameter", *own))
    if len(rows) > MAX_LAYERS:
        left_out = len(rows) - MAX_LAYERS
        rows = [*rows[:MAX_LAYERS], (f"… {left_out} more", "", "", "", "")]
    total = _model_row("total", type(module).__name__, module.parameters(), module.buffers())
    return format_table(("layer", "type", "parameters", "trainable", "MB"), rows, total)


def _model_row(
    name: str, kind: str, parameters: Iterable[torch.nn.Parameter], buffers: Iterable[torch.Tensor]
) -> tuple[str, ...]:
    from torch.nn.parameter import is_lazy

    parameters, buffers = list(parameters), list(buffers)
    tensors = [*parameters, *buffers]
    if any(is_lazy(tensor) for tensor in tensors):
        return name, kind, "?", "?", "?"
    num_trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    count = sum(parameter.numel() for parameter in parameters)
    return name, kind, f"{count:,}", f"{num_trainable:,}", f"{num_bytes / 1e6:,.2f}"


def summarize_result(result: Result, seconds: float | None = None, with_tensorboard: bool = True) -> str:
    """The final values of a fit, its path, and how to look at it; `seconds` is its duration."""
    took = f" in {format_seconds(seconds)}" if seconds is not None else ""
    restarts = f", {result.num_restarts} restarts" if result.num_restarts else ""
    lines = [f"{result.status} after {result.num_epochs:,} epochs, {result.num_steps:,} steps{took}{restarts}"]
    if result.metrics:
        lines.insert(0, format_values(result.metrics) + "\n")
    facts = {"time went to": _shares(result.goodput), "stored in": result.path or ""}
    if result.best_checkpoint is not None:
        facts["best checkpoint"] = result.best_checkpoint.path
    if result.path and with_tensorboard:
        facts["look at it with"] = f"tensorboard --logdir {shlex.quote(result.path)}"
    lines += [f"{name:<16} {fact}" for name, fact in facts.items() if fact]
    return visible("\n".join(lines), keep="\n")


def format_values(values: Mapping[str, float]) -> str:
    """A table of metrics."""
    return format_table(("metric", "value"), [(visible(name), format_value(value)) for name, value in values.items()])


def format_results(stage: str, results: Sequence[Mapping[str, float]]) -> str:
    """The results of `validate` or `test`, a column for each loader."""
    names = list(dict.fromkeys(name for values in results for name in values))
    columns = [stage] if len(results) == 1 else [f"{stage} {index}" for index in range(len(results))]
    cells = {name: [format_value(values[name]) if name in values else "" for values in results] for name in names}
    rows = [[visible(name), *cells[name]] for name in names]
    return format_table(["metric", *columns], rows)


def format_value(value: float) -> str:
    """Five significant digits; whole numbers in full."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def format_seconds(seconds: float) -> str:
    """As 0:07, 12:34 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _shares(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    largest_first = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {spent / total:.0%}" for name, spent in largest_first if total and spent / total >= 0.005)


def _looks_numeric(cell: str) -> bool:
    try:
        float(cell.replace(",", ""))
    except ValueError:
        return cell in ("", "?")
    return True
