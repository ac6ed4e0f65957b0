"""JSON that any tool can read, for any values; and JSON read back, whatever its state."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Set
from typing import Any

from raylight.contract.plain_text import to_utf8

MAX_DEPTH = 100


def to_json(value: Any, indent: int | None = 1) -> bytes:
    """`value` as JSON. Numbers that JSON does not have become the texts "nan", "inf" and "-inf", which `float()` reads;
    other values that it cannot hold become their `str()`."""
    return (json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n").encode()


def plain(value: Any) -> Any:
    """`value` made of dicts, lists, texts, finite numbers, booleans and None only."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return to_utf8(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {to_utf8(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Set):
        return sorted((plain(item) for item in value), key=str)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a number of numpy or torch
        return plain(value.item())
    return to_utf8(str(value))


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises ValueError with the reason if raylight cannot have written it."""
    try:
        content = json.loads(data, object_pairs_hook=_take_once, parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [item for holder in level for item in _items(holder)]
        if not level:
            return content
    raise ValueError("it is nested too deeply")


def _take_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a name that is there twice: JSON allows it, and readers differ in which they take."""
    twice = [name for name, number in Counter(name for name, _ in pairs).items() if number > 1]
    if twice:
        raise ValueError(f"the entry {twice[0]!r} is there more than once")
    return dict(pairs)


def _items(holder: Any) -> list[Any]:
    items = holder.values() if isinstance(holder, dict) else holder
    return [item for item in items if isinstance(item, (dict, list))]


def _refuse_number(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number
