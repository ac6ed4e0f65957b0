"""Hyperparameters in a YAML file of one's own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, MutableMapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from raylight.contract.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from raylight.contract.config import FilePath
    from raylight.contract.kinds import Value


def load_hparams_from_yaml(config_yaml: FilePath, use_omegaconf: bool = True) -> dict[str, Value]:
    """The hyperparameters in the file, as plain values; an empty dict and a warning if it is not there.

    `use_omegaconf` changes nothing. Tags that make Python objects are an error: no code of the file is run.
    """
    path = Path(config_yaml)
    if not path.exists():
        rank_zero_warn(f"{path} is not there, so that no hyperparameters were read", RuntimeWarning)
        return {}
    return dict(yaml.safe_load(path.read_text()) or {})


def save_hparams_to_yaml(
    config_yaml: FilePath, hparams: Mapping[str, Value] | Namespace, use_omegaconf: bool = True
) -> None:
    """Writes the plain values among the hyperparameters; the others are named in a warning."""
    path = Path(config_yaml)
    if not path.parent.is_dir():
        raise RuntimeError(f"the folder {path.parent} is not there")
    values = vars(hparams) if isinstance(hparams, Namespace) else hparams
    plain = {name: _to_plain(value) for name, value in values.items()}
    left_out = [name for name, value in plain.items() if not _can_be_written(value)]
    if left_out:
        rank_zero_warn(f"{path}: no plain values, and so left out: {', '.join(left_out)}")
    path.write_text(yaml.safe_dump({name: value for name, value in plain.items() if name not in left_out}))


def update_hparams(hparams: MutableMapping[str, Value], updates: Mapping[str, Value]) -> None:
    """Puts `updates` into `hparams`, dicts inside them item by item."""
    for name, value in updates.items():
        if name in hparams and isinstance(value, Mapping):
            update_hparams(hparams[name], value)
        else:
            hparams[name] = value


def _to_plain(value: Value) -> Value:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {name: _to_plain(item) for name, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _can_be_written(value: Value) -> bool:
    try:
        yaml.safe_dump(value)
    except yaml.YAMLError:
        return False
    return True
