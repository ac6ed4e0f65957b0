"""What a logger of one's own is made of, under Lightning's module name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from raylight.contract.kinds import Value
from raylight.user.logger import DummyExperiment, DummyLogger, Logger, rank_zero_experiment

__all__ = ["DummyExperiment", "DummyLogger", "Logger", "merge_dicts", "rank_zero_experiment"]


def merge_dicts(
    dicts: Sequence[Mapping[str, Value]],
    agg_key_funcs: Mapping[str, Value] | None = None,
    default_func: Callable[[Sequence[float]], float] = mean,
) -> dict[str, Value]:
    """One dict with the values of each name put together by its function in `agg_key_funcs`, or by `default_func`.
    Nested dicts are merged in the same way, by a nested mapping of functions. None does not count."""
    functions = agg_key_funcs or {}
    merged: dict[str, Value] = {}
    for name in dict.fromkeys(name for each in dicts for name in each):
        values = [each[name] for each in dicts if each.get(name) is not None]
        if values and isinstance(values[0], Mapping):
            merged[name] = merge_dicts(values, functions.get(name), default_func)
        elif values:
            merged[name] = (functions.get(name) or default_func)(values)
    return merged
