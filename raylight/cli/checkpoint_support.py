"""What ties a command line to checkpoints: hyperparameters are its configuration, and the other way round."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from raylight.contract.kinds import StateDict, Value
from raylight.instantiation import PUBLIC_PATH
from raylight.rebuilding import read_plain_hyperparameters
from raylight.user.given_hyperparameters import CLASS_PATH, INSTANTIATOR, giving_hyperparameters

M = TypeVar("M")


class Instantiator:
    """Makes the module or the data module of a configuration, which is what its `save_hyperparameters` keeps."""

    def __init__(self, dump: Callable[[str], StateDict], key: str):
        self.dump, self.key = dump, key

    def __call__(
        self, class_type: type[M], *args: Value, applied_instantiation_links: dict[str, Value], **kwargs: Value
    ) -> M:
        values = self.dump(self.key)
        if "class_path" in values:
            named = {**values.get("init_args", {}), **values.get("dict_kwargs", {})}
            values = {CLASS_PATH: values["class_path"], **named}
        for target, value in applied_instantiation_links.items():
            key, _, path = target.partition(".")
            if key == self.key:
                _set_nested(values, path.removeprefix("init_args."), value)
        values[INSTANTIATOR] = PUBLIC_PATH
        with giving_hyperparameters(class_type, values):
            return class_type(*args, **kwargs)


def _set_nested(values: StateDict, path: str, value: Value) -> None:
    *outer, last = path.split(".")
    for key in outer:
        values = values[key]
    values[last] = value


def read_arguments(path: Value, kind: type) -> StateDict:
    """The model's part of a configuration, as the checkpoint at `path` has kept it; empty if nothing lies there."""
    if not isinstance(path, str | os.PathLike) or not Path(path).exists():
        return {}
    values = read_plain_hyperparameters(path, kind)
    values.pop(INSTANTIATOR, None)
    class_path = values.pop(CLASS_PATH, None)
    return values if class_path is None else {"class_path": class_path, "dict_kwargs": values}
