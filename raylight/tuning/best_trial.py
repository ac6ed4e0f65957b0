"""The last words of a sweep: the best configuration as the line of code that trains it again."""

from __future__ import annotations

import numbers
import os
from collections import Counter
from collections.abc import Mapping
from types import NoneType
from typing import TYPE_CHECKING

from raylight.report.summary import format_seconds
from raylight.report.sweep_table import SweepState, format_number
from raylight.tuning.recipe import Recipe, Shape, is_function_of_config
from raylight.tuning.results import as_number, read_best

if TYPE_CHECKING:
    from ray.tune import Result, ResultGrid


def summarize(state: SweepState, best: Mapping[str, object] | None, code: str, run_path: str, page_path: str) -> str:
    """`best`: the last result of the best trial; None if no trial has one."""
    counts = Counter(row.state for row in state.rows)
    states = ", ".join(f"{count} {name}" for name, count in counts.items())
    lines = [f"{len(state.rows)} trials in {format_seconds(state.elapsed_s)}: {states}"]
    facts: dict[str, object] = {}
    if len(state.rows) < state.total or counts["done"] + counts["failed"] < len(state.rows):
        facts["go on"] = "the same call with resume=True"
    if best is not None:
        facts |= {
            "best": _describe(best, state.metric), "train it again": code,
            "best checkpoint": best.get("best_checkpoint"),
        }  # fmt: skip
    facts["picture"] = page_path
    facts["list trials"] = f"raylight runs {run_path} --metric {state.metric} --mode {state.mode}"
    facts["compare them"] = f"tensorboard --logdir {run_path}"
    return "\n".join(lines + [f"{name:<16} {fact}" for name, fact in facts.items() if fact])


def find_best(results: ResultGrid, metric: str) -> Result | None:
    """The trial that holds the best checkpoint; None if none has a number."""
    results_of_trials = map(results.__getitem__, range(len(results)))
    has_number = any(read_best(result.metrics, metric) is not None for result in results_of_trials)
    return results.get_best_result() if has_number else None


def _describe(best: Mapping[str, object], metric: str) -> str:
    last = as_number(best[metric])
    in_checkpoint = as_number(best.get(f"best_{metric}", last))
    value = f"{metric} {format_number(last)} at epoch {best['epoch']}"
    return value if in_checkpoint == last else f"{value}, {format_number(in_checkpoint)} in its best checkpoint"


def write_code(recipe: Recipe, config: Mapping[str, object], given: Mapping[str, object], shape: Shape) -> str:
    """`given`: the trainer's arguments as the user wrote them."""
    data, arguments = _data(recipe, config, shape), _arguments(given)
    if recipe.is_class:
        module = _call(recipe.name, recipe.module_arguments(config))
        return _fit(module, data, _arguments({**given, **recipe.trainer_arguments(config)}))
    returned, call = shape.returned, f"{_name(recipe.target)}({_show(dict(config))})"
    if len(returned) < 2:
        return _fit(call, data, arguments)
    names = ("module", "data", "arguments")[: len(returned)]
    if returned[1] is not NoneType:
        data = "*data" if shape.is_several_loaders else "data"
    if returned[2:] and returned[2] is not NoneType:
        arguments.append("**arguments")
    return f"{', '.join(names)} = {call}; {_fit('module', data, arguments)}"


def _fit(module: str, data: str, arguments: list[str]) -> str:
    return f"raylight.fit({', '.join(part for part in (module, data, *arguments) if part)})"


def _data(recipe: Recipe, config: Mapping[str, object], shape: Shape) -> str:
    data, star = recipe.data, "*" if shape.is_several_loaders else ""
    if data is None:
        return ""
    if isinstance(data, type):
        return f"datamodule={_call(data.__name__, recipe.data_arguments(config))}"
    return f"{star}{_name(data)}({_show(dict(config))})" if is_function_of_config(data) else f"{star}data"


def _call(name: str, arguments: Mapping[str, object]) -> str:
    return f"{name}({', '.join(_arguments(arguments))})"


def _name(function: object) -> str:
    """A lambda has none."""
    name = getattr(function, "__name__", "function")
    return name if name.isidentifier() else "function"


def _arguments(values: Mapping[str, object]) -> list[str]:
    return [f"{name}={_show(value)}" for name, value in values.items()]


def _show(value: object) -> str:
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if value is None or isinstance(value, (bool, str)):
        return repr(value)
    if isinstance(value, numbers.Integral):  # numpy's too, which show themselves as np.int64(3)
        return repr(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value))
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_show(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_show(item)}" for key, item in value.items()) + "}"
    return "..."
