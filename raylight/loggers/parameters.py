"""Hyperparameters and values in the forms that loggers take."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.contract.plain_numbers import to_python

HPARAMS_FILE = "hparams.yaml"


def to_mapping(params: Value) -> dict[str, Value]:
    """A dict from a dict, namespace, dataclass or None."""
    if params is None:
        return {}
    if is_dataclass(params) and not isinstance(params, type):
        return asdict(params)
    return dict(params if isinstance(params, Mapping) else vars(params))


def to_plain(value: Value) -> Value:
    """What JSON and YAML can say: numbers, texts, lists and dicts; anything else as text."""
    value = to_python(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping | Namespace) or (is_dataclass(value) and not isinstance(value, type)):
        return {str(name): to_plain(item) for name, item in to_mapping(value).items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value.__name__ if isinstance(value, type) or hasattr(value, "__name__") else str(value)


def flatten(params: Value, delimiter: str = "/", prefix: str = "") -> dict[str, Value]:
    """Nested names joined by `delimiter`; a list of dicts by the index of each."""
    flat: dict[str, Value] = {}
    for name, value in to_mapping(params).items():
        path = f"{prefix}{name}"
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping | Namespace) or (is_dataclass(value) and not isinstance(value, type)):
            flat |= flatten(value, delimiter, f"{path}{delimiter}")
        else:
            flat[path] = value
    return flat


def to_yaml(params: Mapping[str, Value]) -> bytes:
    """Hyperparameters as a text of YAML, in their order."""
    import yaml

    text: str = yaml.safe_dump(to_plain(params), sort_keys=False, allow_unicode=True)
    return text.encode("utf-8", "replace")


def to_numbers(owner: str, metrics: Mapping[str, Value], prefix: str, separator: str = "-") -> dict[str, float]:
    """Plain numbers under prefixed names."""
    values: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            number = value if type(value) is int else float(value)
        except (TypeError, ValueError) as error:
            raise InvalidArguments(
                f"{owner}.log_metrics: {name!r} is no number but {type(value).__name__}: {error}"
            ) from error
        values[f"{prefix}{separator}{name}" if prefix else name] = number
    return values
