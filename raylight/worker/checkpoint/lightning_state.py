"""A file in Lightning's format as the state that a run goes on from; what Lightning wrote, and what raylight wrote."""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch.serialization import MAP_LOCATION

from raylight.contract.errors import CheckpointCorrupt
from raylight.contract.kinds import StateDict, Value
from raylight.user.checkpoint_io import CheckpointIO, load_through
from raylight.worker.checkpoint.lightning_loops import read_loops, standing_of, to_progress, write_loops
from raylight.worker.checkpoint.pickled_values import Withholding, find_withheld, put_together
from raylight.worker.checkpoint.plain_values import restore_arrays
from raylight.worker.checkpoint.restore import in_own_memory, read_file
from raylight.worker.checkpoint.state import OwnState, ReplicatedState, State
from raylight.worker.checkpoint.typed_values import TAG
from raylight.worker.progress import Progress

LIGHTNING_VERSION = "2.6.0"
"""Whose format files have, and `on_save_checkpoint` sees."""
OWN_KEY = "raylight"
"""Of all that raylight knows and Lightning has no place for."""
OWN_FORMAT = 1
SCALER_KEYS = ("MixedPrecision", "native_amp_scaling_state")
_TRAINING_KEYS = ("optimizer_states", "lr_schedulers", "callbacks")
_HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")
_KNOWN = {"state_dict", "epoch", "global_step", "loops", OWN_KEY, *SCALER_KEYS, *_TRAINING_KEYS, *_HYPERPARAMETERS}
_TYPES: list[Value] = [
    argparse.Namespace,
    *((dict, f"{package}.AttributeDict") for package in (
        "lightning.fabric.utilities.data", "lightning_fabric.utilities.data",
        "lightning.pytorch.utilities.parsing", "pytorch_lightning.utilities.parsing",
    )),
]  # fmt: skip


def read_content(
    file: str | BinaryIO, where: str, map_location: MAP_LOCATION = "cpu", weights_only: bool = True
) -> Value:
    """As `read_file`, with those of Lightning's own types that hold values and do nothing."""
    try:
        with torch.serialization.safe_globals(_TYPES):
            return read_file(file, where, map_location, weights_only)
    except CheckpointCorrupt as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise CheckpointCorrupt(f"{error}. weights_only=False reads it, and runs what is in it") from error
        raise


def load_content(
    file: str | bytes, plugin: CheckpointIO, map_location: MAP_LOCATION = "cpu", weights_only: bool = True
) -> StateDict:
    """The content of a file, by path or URI, or of its bytes."""
    if isinstance(file, bytes):
        content = read_content(io.BytesIO(file), "the file", map_location, weights_only)
        if not isinstance(content, dict):
            raise CheckpointCorrupt(f"the file is no checkpoint: it holds a {type(content).__name__}")
        return content
    return load_through(plugin, file, map_location, weights_only)


def load_lightning(path: str, map_location: MAP_LOCATION = "cpu") -> State:
    """The state in a file of this machine. Raises `CheckpointCorrupt` where it holds objects that only running its
    code would rebuild."""
    return to_state(read_content(path, path, map_location), path)


def to_state(content: Value, where: str, rank: int = 0, world_size: int = 1, weights_only: bool = True) -> State:
    """What `rank` of `world_size` needs of a file's content. With `weights_only` what only running code rebuilds stays
    apart. Raises CheckpointCorrupt, naming `where`."""
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointCorrupt(f"{where} is no Lightning checkpoint: it has no state_dict.")
    try:
        own = content.get(OWN_KEY)
        is_own = isinstance(own, dict) and _is_readable(own, where)
        state = _read_own(content, own or {}, rank, world_size) if is_own else _read_theirs(content, where)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointCorrupt(f"{where} is no whole checkpoint: {type(error).__name__}: {error}") from error
    state.module["progress"] = {key: content.get(key, 0) for key in ("epoch", "global_step")}
    state.module["extra"] = restore_arrays({key: value for key, value in content.items() if key not in _KNOWN})
    if not weights_only:
        put_together(state)
    return state


def find_facts(content: Mapping[str, Value]) -> tuple[int | None, int, int]:
    """The seed of the run if raylight made the file, and how many steps and epochs it had trained."""
    own = content.get(OWN_KEY)
    facts = own["module"].get("facts", {}) if isinstance(own, dict) and isinstance(own.get("module"), dict) else {}
    seed = facts.get("seed")
    numbers = [value if isinstance(value := content.get(key), int) else 0 for key in ("global_step", "epoch")]
    return seed if isinstance(seed, int) else None, numbers[0], numbers[1]


def _is_readable(own: StateDict, where: str) -> bool:
    """Whether it is raylight's entry, and not one of the user's under that name."""
    if "format" in own and own["format"] != OWN_FORMAT:
        raise CheckpointCorrupt(f"{where} was written by raylight {own.get('version')}: update raylight to read it")
    return "format" in own


def _read_own(content: StateDict, own: StateDict, rank: int, world_size: int) -> State:
    model, module = content["state_dict"], restore_arrays(dict(own["module"]))
    if "own" not in own or not _has_training(content):
        return State(model, module=module)
    training: ReplicatedState = {**_read_training(content), **in_own_memory(restore_arrays(own["replicated"]))}
    ranks: list[OwnState] = [in_own_memory(restore_arrays(its)) for its in own["own"]]
    if len(ranks) == world_size:
        return State(model, training, ranks[rank], module)
    return State(model, training, module=module, others=ranks)


def _read_theirs(content: StateDict, where: str) -> State:
    module: StateDict = {"hyper_parameters": {}}
    for key in _HYPERPARAMETERS:
        values = content.get(key, {})
        if not isinstance(values, dict | argparse.Namespace | None):
            raise CheckpointCorrupt(f"{where} is no Lightning checkpoint: its {key} are a {type(values).__name__}.")
        if key in content:
            module[key] = dict(vars(values) if isinstance(values, argparse.Namespace) else values or {})
    if isinstance(name := content.get("hparams_name"), str):  # what was one object there is one AttributeDict here
        keys = list(module["hyper_parameters"])
        module["hyper_parameters_argument"] = {"name": name, "keys": keys, "shell": {TAG: "attributes"}}
    if not _has_training(content) or "loops" not in content:
        return State(content["state_dict"], module=module)
    standing = read_loops(content["loops"], int(content["global_step"]), where)
    training: ReplicatedState = {
        **_read_training(content), "loop": to_progress(standing).state_dict(), "metrics": {}
    }  # fmt: skip
    return State(content["state_dict"], training, module=module)


def _has_training(content: StateDict) -> bool:
    return all(key in content for key in _TRAINING_KEYS)


def _read_training(content: StateDict) -> ReplicatedState:
    scaler: StateDict = next((content[key] for key in SCALER_KEYS if key in content), {})
    return {
        "optimizers": in_own_memory(restore_arrays(content["optimizer_states"])),
        "schedulers": restore_arrays(content["lr_schedulers"]),
        "callbacks": in_own_memory(restore_arrays(content["callbacks"])),
        "precision": scaler,
    }


# ---- what on_load_checkpoint sees


def show_to_hooks(state: State, hyper_parameters: StateDict) -> StateDict:
    """The state under the keys of Lightning's files."""
    saved, progress = state.replicated, Progress()
    if "loop" in saved:
        progress.load_state_dict(saved["loop"])
    facts = state.module.get("facts", {})
    shown: StateDict = {
        "epoch": progress.current_epoch,
        "global_step": progress.global_step,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": state.model,
        "loops": write_loops(standing_of(progress, facts.get("num_batches")), facts.get("automatic", True)),
        "hyper_parameters": hyper_parameters,
    }
    if saved:
        shown |= {
            "callbacks": saved["callbacks"], "optimizer_states": saved["optimizers"],
            "lr_schedulers": saved["schedulers"],
        }  # fmt: skip
    shown |= {**state.module.get("extra", {}), **state.module.get("progress", {})}
    return Withholding(shown, find_withheld(state, "extra"))
