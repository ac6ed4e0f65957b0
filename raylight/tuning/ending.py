"""What a sweep says when it is over: the best configuration as the line of code that trains it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from raylight.report.summary import format_seconds
from raylight.report.sweep_table import SweepState, format_number
from raylight.tuning.recipe import Recipe, is_function_of_config


def summarize(state: SweepState, best: Mapping[str, Any] | None, code: str, run_path: str, page_path: str) -> str:
    """`best`: the last result of the best trial; None where no trial has one."""
    counts = Counter(row.state for row in state.rows)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    lines = [f"{len(state.rows)} trials in {format_seconds(state.elapsed_s)}: {told}"]
    facts: dict[str, Any] = {}
    if best is not None:
        facts |= {
            "best": f"{state.metric} {format_number(best[state.metric])} at epoch {best['epoch']}",
            "train it again": code, "best checkpoint": best.get("best_checkpoint"),
        }  # fmt: skip
    facts["picture"] = page_path
    facts["list trials"] = f"raylight runs {run_path} --metric {state.metric} --mode {state.mode}"
    facts["compare them"] = f"tensorboard --logdir {run_path}"
    return "\n".join(lines + [f"{name:<16} {fact}" for name, fact in facts.items() if fact])


def write_code(recipe: Recipe, config: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """`given`: the trainer's arguments as the user wrote them."""
    if not recipe.is_class:
        call = f"{recipe.name}({_show(dict(config))})"
        return f"module, data, arguments = {call}; raylight.fit(module, *data, {_arguments({**given})}**arguments)"
    module = f"{recipe.name}({_arguments(recipe.module_arguments(config)).removesuffix(', ')})"
    arguments = _arguments({**given, **recipe.trainer_arguments(config)}).removesuffix(", ")
    parts = [module, _data(recipe, config), arguments]
    return f"raylight.fit({', '.join(part for part in parts if part)})"


def _data(recipe: Recipe, config: Mapping[str, Any]) -> str:
    data = recipe.data
    if data is None:
        return ""
    if isinstance(data, type):
        return f"datamodule={data.__name__}({_arguments(recipe.data_arguments(config)).removesuffix(', ')})"
    if is_function_of_config(data):
        name = getattr(data, "__name__", "data")
        call = f"{name if name.isidentifier() else 'data'}({_show(dict(config))})"
        return f"*{call}"
    return "*data" if isinstance(data, (tuple, list)) else "data"


def _arguments(values: Mapping[str, Any]) -> str:
    return "".join(f"{name}={_show(value)}, " for name, value in values.items())


def _show(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_show(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_show(item)}" for key, item in value.items()) + "}"
    return "..."
