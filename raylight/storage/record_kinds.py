"""The types of the fields of run.json: a damaged field is found when it is read, not when it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]

LATEST_S = 1e11  # seconds that a calendar still has a year for


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= LATEST_S


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 63


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_attempts(value: Any) -> bool:
    """Whether `value` is a list of attempts. In old versions one may be anything: its number is its place then."""
    known = {"attempt": _is_count, "duration_s": _is_seconds}
    return isinstance(value, list) and all(not isinstance(item, dict) or not _wrong(item, known) for item in value)


def _is_trial(value: Any) -> bool:
    known: dict[str, Check] = {"config": _is_object, "clones": _is_clones, "result_steps": _is_counts, "name": _is_text}
    return isinstance(value, dict) and not _wrong(value, known)


def _is_clones(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and _is_count(item.get("attempt")) for item in value)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(_is_count(item) for item in value)


def _is_goodput(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_seconds(item) for item in value.values())


_SCALARS: dict[str, Check] = {
    "name": _is_text, "status": _is_text, "stage": _is_text, "error": _is_text, "python": _is_text,
    "git_commit": _is_text, "resumed_from": _is_text, "best_checkpoint": _is_text, "last_checkpoint": _is_text,
    "version": _is_count, "seed": _is_count, "started_at": _is_seconds, "finished_at": _is_seconds,
    "duration_s": _is_seconds, "trial": _is_trial,
}  # fmt: skip
_CONTAINERS: dict[str, Check] = {
    "arguments": _is_object, "hyperparameters": _is_object, "metrics": _is_object, "packages": _is_object,
    "goodput": _is_goodput, "attempts": _is_attempts, "restarts": lambda value: isinstance(value, list),
    "command": _is_texts,
}  # fmt: skip


def find_wrong_field(record: Mapping[str, Any]) -> str | None:
    """The name of a field that raylight cannot have written so; None if there is none."""
    scalars = {name: value for name, value in record.items() if value is not None}
    return next(iter(_wrong(scalars, _SCALARS) + _wrong(record, _CONTAINERS)), None)


def _wrong(values: Mapping[str, Any], known: Mapping[str, Check]) -> list[str]:
    return [name for name, fits in known.items() if name in values and not fits(values[name])]
