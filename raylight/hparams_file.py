"""Hyperparameters from a file of the user's: hparams.yaml, or Lightning's table of keys and values."""

from __future__ import annotations

import ast
import csv
import io
import os
from typing import Any

import yaml

from raylight.contract.errors import InvalidArguments
from raylight.storage import single_file

_KINDS = (".yaml", ".yml", ".csv")


def read_hparams_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values by name. Raises InvalidArguments for a file of another kind, and MissingFile."""
    ending = os.path.splitext(os.fspath(path))[1].lower()
    if ending not in _KINDS:
        raise InvalidArguments(f"hparams_file={os.fspath(path)!r} must end in {', '.join(_KINDS)}")
    with single_file.open_read(path) as file:
        text = file.read().decode()
    try:
        found = _read_table(text) if ending == ".csv" else yaml.safe_load(text)
    except (yaml.YAMLError, csv.Error, IndexError) as error:
        raise InvalidArguments(f"hparams_file={os.fspath(path)!r} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InvalidArguments(f"hparams_file={os.fspath(path)!r} does not hold values by name")
    return found


def _read_table(text: str) -> dict[str, Any]:
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    return {row[0]: _convert(row[1]) for row in rows[1:]}  # the first names the columns


def _convert(text: str) -> Any:
    """A literal of Python, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
