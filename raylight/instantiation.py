"""Objects made of a command line's configuration, in which a class and its arguments stand for an object."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TypeVar

from raylight.contract.errors import CheckpointMismatch
from raylight.contract.kinds import StateDict, Value
from raylight.user.given_hyperparameters import CLASS_PATH, INSTANTIATOR, giving_hyperparameters

M = TypeVar("M")
PUBLIC_PATH = "raylight.cli.instantiate_module"


def instantiate_module(class_type: type[M], config: StateDict) -> M:
    """Makes an object of `class_type`, or of the class that `config` names, with the arguments in `config`.

    A file may have chosen these. So of the classes that they name only those are made that this process has imported
    already, each where an argument's type allows it. Raises CheckpointMismatch.
    """
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise ImportError(
            "it was made by LightningCLI, which needs jsonargparse: pip install 'raylight[cli]'"
        ) from error

    config = {key: value for key, value in config.items() if key != INSTANTIATOR}
    unknown = sorted({path for path in _find_class_paths(config) if not isinstance(_find_imported(path), type)})
    if unknown:
        raise CheckpointMismatch(
            f"the checkpoint names classes that this program has not imported: {', '.join(unknown)}. Import them "
            "before load_from_checkpoint, or pass objects in place of the arguments"
        )
    path = config.get(CLASS_PATH)
    kind = class_type if path is None else _find_imported(path)
    parser = ArgumentParser(exit_on_error=False)
    if path is None:
        parser.add_class_arguments(class_type, "module", fail_untyped=False)
        content = config
    else:
        parser.add_subclass_arguments(class_type, "module", fail_untyped=False)
        content = {"class_path": path, "dict_kwargs": {key: it for key, it in config.items() if key != CLASS_PATH}}
    parsed = parser.parse_object({"module": content})
    with giving_hyperparameters(kind, {**config, INSTANTIATOR: PUBLIC_PATH}):
        made: M = parser.instantiate(parsed).module
    return made


def _find_class_paths(value: Value) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (value[key] for key in ("class_path", CLASS_PATH) if isinstance(value.get(key), str))
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _find_class_paths(item)


def _find_imported(path: str) -> Value:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
