"""Modules and data modules from checkpoints of every kind: `load_from_checkpoint`."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import torch

from raylight.contract.config import FilePath
from raylight.contract.errors import CheckpointCorrupt, CheckpointMismatch, InvalidArguments, MissingFile
from raylight.contract.kinds import StateDict, Value
from raylight.hparams_file import read_hparams_file
from raylight.instantiation import instantiate_module
from raylight.loading import CHECKPOINT_KINDS, find_by_path, find_of_tune, is_single_file
from raylight.storage import single_file
from raylight.storage.checkpoints import Checkpoint
from raylight.storage.filesystem import Storage
from raylight.user.checkpoint_reader import CheckpointPath, MapLocation
from raylight.user.given_hyperparameters import INSTANTIATOR
from raylight.user.overriding import overrides as overrides_hook
from raylight.worker.checkpoint.kept_hyperparameters import DATA_MODULE_KEY, MODULE_KEY, Kept, read_hyperparameters
from raylight.worker.checkpoint.lightning_state import read_content, show_to_hooks, to_state
from raylight.worker.checkpoint.pickled_values import put_together
from raylight.worker.checkpoint.restore import apply_weights, load_state

if TYPE_CHECKING:
    from raylight.worker.checkpoint.state import State

M = TypeVar("M")
INSTANTIATORS = (
    "raylight.cli.instantiate_module", "lightning.pytorch.cli.instantiate_module",
    "pytorch_lightning.cli.instantiate_module",
)  # fmt: skip
"""The functions that a configuration among hyperparameters may name; all stand for raylight's."""


def load_module(
    owner: type[M], path: CheckpointPath, map_location: MapLocation, hparams_file: FilePath | None,
    strict: bool | None, weights_only: bool | None, overrides: dict[str, Value],
) -> M:  # fmt: skip
    """`Module.load_from_checkpoint`."""
    state = _load_state(path, map_location, weights_only)
    kept = read_hyperparameters(_replace_hyperparameters(state.module, hparams_file, MODULE_KEY), owner)
    module: Value = _make(owner, kept, overrides)
    if strict and not module.strict_loading:
        raise InvalidArguments(
            f"load_from_checkpoint(strict=True) and {owner.__name__}.strict_loading=False contradict each other; keep "
            "one of them"
        )
    if overrides_hook(module, "configure_model"):
        module.configure_model()
    checkpoint = show_to_hooks(state, {**kept.values, **overrides})
    module.on_load_checkpoint(checkpoint)
    apply_weights(module, checkpoint["state_dict"], strict=module.strict_loading if strict is None else strict)
    tensors = (value for value in checkpoint["state_dict"].values() if isinstance(value, torch.Tensor))
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    loaded: M = module if module.device == device else module.to(device)
    return loaded


def load_data_module(
    owner: type[M], path: CheckpointPath, map_location: MapLocation, hparams_file: FilePath | None,
    weights_only: bool | None, overrides: dict[str, Value],
) -> M:  # fmt: skip
    """`DataModule.load_from_checkpoint`."""
    state = _load_state(path, map_location, weights_only)
    module = _replace_hyperparameters(state.module, hparams_file, DATA_MODULE_KEY)
    made: Value = _make(owner, read_hyperparameters(module, owner, DATA_MODULE_KEY), overrides)
    held = state.replicated.get("data_module") or module.get("extra", {}).get(owner.__qualname__)
    if held:
        made.load_state_dict(held)
    loaded: M = made
    return loaded


def read_plain_hyperparameters(path: FilePath, owner: type) -> StateDict:
    """The hyperparameters that a checkpoint has kept for a module."""
    return read_hyperparameters(_load_state(path, "cpu", None).module, owner).values


def _make(owner: type[M], kept: Kept, overrides: dict[str, Value]) -> M:
    """An object with the hyperparameters of a checkpoint; a command line's configuration may be among them."""
    made_by = kept.values.get(INSTANTIATOR)
    if made_by is None:
        return owner(**_accepted(owner, kept, overrides))
    if made_by not in INSTANTIATORS:
        raise CheckpointMismatch(f"the checkpoint is to be read by {made_by!r}; allowed are {INSTANTIATORS}")
    return instantiate_module(owner, kept.arguments(overrides, dict.fromkeys([*kept.values, *kept.missing])))


def _load_state(path: CheckpointPath, map_location: MapLocation, weights_only: bool | None) -> State:
    """Weights, hyperparameters and what hooks may ask for, of any kind of checkpoint."""
    is_path = isinstance(path, str | os.PathLike)
    if hasattr(path, "as_directory"):
        path = find_of_tune(path)
    elif hasattr(path, "read") or (is_path and is_single_file(os.fspath(path))):
        where = os.fspath(path) if is_path else "the file"
        return to_state(
            read_file(path, map_location or _where_it_was, weights_only), where, weights_only=weights_only is not False
        )
    elif is_path:
        path = find_by_path(os.fspath(path))
    if not isinstance(path, Checkpoint):
        raise InvalidArguments(f"load_from_checkpoint({path!r}): {CHECKPOINT_KINDS}")
    state = load_state(path, 0, 1, map_location or "cpu")
    state.module["progress"] = {"epoch": path.epoch, "global_step": path.step}
    if weights_only is False:
        put_together(state)
    return state


def _where_it_was(storage: Value, location: str) -> Value:
    """On the device that it was saved from if this machine has such, else on the CPU."""
    is_here = not location.startswith("cuda") or torch.cuda.is_available()
    return None if is_here else storage


def _replace_hyperparameters(module: StateDict, hparams_file: FilePath | None, key: str) -> StateDict:
    """Those of a file take the place of the checkpoint's."""
    if hparams_file is None:
        return module
    return {**module, f"{key}_unsaved": {}, key: read_hparams_file(hparams_file)}


def read_file(path: FilePath | BinaryIO, map_location: MapLocation, weights_only: bool | None) -> StateDict:
    """The content of a file of torch.save, at a path or URI, or opened. Nothing in it is run unless `weights_only` is
    False. Raises CheckpointCorrupt or MissingFile."""
    runs_nothing = weights_only is not False
    if not isinstance(path, str | os.PathLike):
        name = getattr(path, "name", "")
        content = read_content(path, name if isinstance(name, str) and name else "the file", map_location, runs_nothing)
    elif (local := Storage(path).local_path()) is not None:
        if not os.path.isfile(local):
            raise MissingFile(f"there is no file {local}")
        content = read_content(local, local, map_location, runs_nothing)
    else:
        with single_file.open_read(path) as file:
            content = read_content(file, os.fspath(path), map_location, runs_nothing)
    if not isinstance(content, dict):
        raise CheckpointCorrupt(f"{path} is no checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def _accepted(owner: type, kept: Kept, overrides: dict[str, Value]) -> dict[str, Value]:
    """The hyperparameters that `__init__` takes. Raises CheckpointMismatch if it needs more."""
    parameters = inspect.signature(owner).parameters
    hparams = kept.arguments(overrides, parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return hparams
    inner = kept.argument.keys if kept.argument is not None else ()
    unknown = [name for name in overrides if name not in parameters and name not in inner]
    missing = [
        name for name, p in parameters.items()
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and name not in hparams
    ]  # fmt: skip
    mistakes = [f"{owner.__name__} takes no argument {name!r}; it takes {list(parameters)}" for name in unknown]
    mistakes += [
        f"{owner.__name__} needs {name!r}, which is not in the checkpoint: call save_hyperparameters() in __init__, or "
        f"load_from_checkpoint(path, {name}=...)"
        for name in missing
    ]
    if mistakes:
        raise CheckpointMismatch("\n".join(mistakes))
    return {name: value for name, value in hparams.items() if name in parameters}
