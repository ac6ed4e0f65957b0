"""JSON that any tool can read, whatever the values were."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from typing import Any


def to_json(value: Any, indent: int | None = 1) -> bytes:
    """Numbers that JSON does not have become the texts "nan", "inf" and "-inf", which `float()` reads; what JSON cannot
    hold becomes its `str()`."""
    return (json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n").encode()


def plain(value: Any) -> Any:
    """The value out of dicts, lists, texts, finite numbers, booleans and None alone."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Set):
        return sorted((plain(item) for item in value), key=str)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a number of numpy or torch
        return plain(value.item())
    return str(value)
