"""Reading checkpoints: state saved by any number of ranks, mapped lazily, without running any code from a file."""

from __future__ import annotations

import difflib
import errno
import pickle
import re
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.serialization import MAP_LOCATION

from raylight.contract.errors import CheckpointCorrupt, CheckpointMismatch, MissingFile, StorageError
from raylight.contract.kinds import StateDict, Value
from raylight.contract.plain_text import to_utf8
from raylight.contract.task import SavedState
from raylight.worker.checkpoint.plain_values import restore_arrays
from raylight.worker.checkpoint.staging import MODULE_FILE, model_file, training_file
from raylight.worker.checkpoint.state import State

_CHUNK_BYTES = 8 << 20
_MODEL_FILE = re.compile(r"model-\d{5}-of-(\d{5})\.pt")
_TRAINING_KEYS = {"replicated", "shared", "tensors", "own"}


def load_state(saved: SavedState, rank: int, world_size: int, map_location: MAP_LOCATION = "cpu") -> State:
    """Read a checkpoint of any world size as `rank` of `world_size` needs it.

    `own` is what the same rank saved where the world size is the same; else it is empty, and `others` holds what each
    rank saved. Weights stay mapped to the files until they are used. Raises `CheckpointCorrupt`.
    """
    state = load_any(saved, map_location)
    saved_world_size = _find_world_size(saved)
    if training_file(0, saved_world_size) not in saved.file_names:
        return state  # weights alone

    parts = [_load(saved, training_file(r, saved_world_size), map_location) for r in range(saved_world_size)]
    if any(part.keys() != parts[0].keys() or not part.keys() >= _TRAINING_KEYS for part in parts):
        raise CheckpointCorrupt(f"{saved.path} holds training files that raylight did not write.")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= part["tensors"]
    if missing := [path for path in parts[0]["shared"] if path not in tensors]:
        raise CheckpointCorrupt(f"{saved.path} lacks {_enumerate(missing)}: ranks disagreed on who writes what.")
    replicated = restore_arrays(_put_back(parts[0]["replicated"], "replicated", tensors))
    owns = [restore_arrays(in_own_memory(part["own"])) for part in parts]
    if saved_world_size == world_size:
        return replace(state, replicated=replicated, own=owns[rank])
    return replace(state, replicated=replicated, others=owns)


def load_any(source: SavedState, map_location: MAP_LOCATION = "cpu") -> State:
    """Read what a module is rebuilt from: weights and hyperparameters."""
    model, module = _merge_model(source, _find_world_size(source), map_location), {}
    if MODULE_FILE in source.file_names:
        module = restore_arrays(_load(source, MODULE_FILE, map_location))
        if any(not isinstance(value, dict) for value in module.values()):
            raise CheckpointCorrupt(f"{source.path}/{MODULE_FILE} holds something else than raylight writes there.")
    return State(model=model, module=module)


def load_weights(saved: SavedState) -> StateDict:
    """Read the module's state dict alone, on the CPU, mapped to the files until it is used."""
    return _merge_model(saved, _find_world_size(saved), "cpu")


@dataclass(frozen=True, slots=True)
class Report:
    """How weights differ from what a module has; false where they fit."""

    missing: dict[str, list[str]] = field(default_factory=dict)
    """Keys of the module that the weights lack, with similar keys of the weights."""
    unexpected: dict[str, list[str]] = field(default_factory=dict)
    """Keys of the weights that the module lacks, with similar keys of the module."""
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Shape in the weights and shape in the module."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        lines = _list("missing in the checkpoint", self.missing) + _list("not in the module", self.unexpected)
        if self.misshapen:
            lines.append(f"  of another shape ({len(self.misshapen)}):")
            lines += [
                f"    {key}: {_shape(theirs)} in the checkpoint, {_shape(ours)} in the module"
                for key, (theirs, ours) in self.misshapen.items()
            ]
        return "\n".join(lines)


def compare_weights(module: torch.nn.Module, weights: StateDict) -> Report:
    """Compare keys and shapes; a lazy parameter takes any shape."""
    ours = module.state_dict()
    missing = [key for key in ours if key not in weights]
    unexpected = [key for key in weights if key not in ours]
    misshapen = {
        key: (tuple(weights[key].shape), tuple(value.shape))
        for key, value in ours.items()
        if isinstance(value, Tensor) and not is_lazy(value) and isinstance(weights.get(key), Tensor)
        and weights[key].shape != value.shape
    }  # fmt: skip
    return Report(_with_similar(missing, unexpected), _with_similar(unexpected, missing), misshapen)


def apply_weights(module: torch.nn.Module, weights: StateDict, strict: bool = True) -> Report:
    """Load `weights` into `module`, and return how they differ from what it has.

    With `strict`, any difference raises `CheckpointMismatch` before the module is touched; without, what fits is
    loaded.
    """
    report = compare_weights(module, weights)
    if not strict:
        fits = OrderedDict((key, value) for key, value in weights.items() if key not in report.misshapen)
        fits.__dict__.update(vars(weights) if isinstance(weights, OrderedDict) else {})
        module.load_state_dict(fits, strict=False)
        return report
    if report and not any(part._load_state_dict_pre_hooks for part in module.modules()):  # such hooks may rename keys
        raise _mismatch(module, str(report))
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise _mismatch(module, str(report) or f"  {error}") from error
    return Report()


def _find_world_size(saved: SavedState) -> int:
    """The number of ranks that wrote the checkpoint; raises where the file of one is missing."""
    found = {int(match[1]) for name in saved.file_names if (match := _MODEL_FILE.fullmatch(name))}
    if len(found) != 1:
        raise CheckpointCorrupt(f"{saved.path} holds the model files of {len(found)} checkpoints, not of one.")
    world_size = found.pop()
    names = [model_file(rank, world_size) for rank in range(world_size)]
    if any(name.startswith("training-") for name in saved.file_names):
        names += [training_file(rank, world_size) for rank in range(world_size)]
    if missing := [name for name in names if name not in saved.file_names]:
        raise CheckpointCorrupt(f"{saved.path} lacks {_enumerate(missing)}.")
    return world_size


def _merge_model(saved: SavedState, world_size: int, map_location: MAP_LOCATION) -> StateDict:
    model = _load(saved, model_file(0, world_size), map_location)
    for name, value in model.items():
        if not isinstance(value, Tensor):  # what get_extra_state returned
            model[name] = restore_arrays(value)
    for rank in range(1, world_size):
        model.update(_load(saved, model_file(rank, world_size), map_location))
    return model


def _load(saved: SavedState, name: str, map_location: MAP_LOCATION) -> StateDict:
    where = f"{saved.path}/{name}"
    local = saved.local_path(name)
    if local is not None:
        content = read_file(local, where, map_location)
    else:
        with tempfile.NamedTemporaryFile(prefix="raylight-", suffix=".pt") as file:  # the mapping outlives its name
            _copy_here(saved, name, file)
            content = read_file(file.name, where, map_location)
    if not isinstance(content, dict):
        raise CheckpointCorrupt(f"{where} holds a {type(content).__name__}, not a dict.")
    return content


def _copy_here(saved: SavedState, name: str, file: Value) -> None:
    try:
        stream = saved.open_read(name)
    except MissingFile as error:
        raise CheckpointCorrupt(f"{saved.path}/{name} is missing.") from error
    with stream:
        try:
            shutil.copyfileobj(stream, file, _CHUNK_BYTES)
            file.flush()
        except OSError as error:
            raise StorageError(
                f"{saved.path}/{name} could not be copied to {tempfile.gettempdir()}: {error}. It needs room for the "
                "whole file; set TMPDIR to a folder that has it."
            ) from error


def read_file(file: str | BinaryIO, where: str, map_location: MAP_LOCATION = "cpu", weights_only: bool = True) -> Value:
    """Tensors and plain values; of a path, mapped. Raises `CheckpointCorrupt`, naming `where`, and runs nothing, unless
    `weights_only` is False."""
    if isinstance(file, str) and to_utf8(file) != file:  # torch cannot map a file whose name is no UTF-8
        with open(file, "rb") as opened:
            return read_file(opened, where, map_location, weights_only)
    try:
        return torch.load(file, map_location=map_location, mmap=isinstance(file, str), weights_only=weights_only)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{where} is missing.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointCorrupt(
            f"{where} holds something that is neither a tensor nor a plain value, and nothing in it was run: "
            f"{_reason(error)}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # what damaged bytes lead to is not for torch to say
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is how an empty file cannot be mapped
            raise
        raise CheckpointCorrupt(f"{where} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """torch's own message, without its advice to load the file unsafely."""
    if isinstance(error.__context__, pickle.UnpicklingError):
        error = error.__context__
    text = re.split(r"\.? (?:Please use|In PyTorch 2\.6)", str(error).strip())[0]
    return text.splitlines()[0] if text else type(error).__name__


def in_own_memory(value: Value) -> Value:
    """A copy in which no tensor is mapped to a file."""
    return _put_back(value, "", {})


def _put_back(value: Value, path: str, tensors: dict[str, Tensor]) -> Value:
    """The structure with its shared tensors in their places, and every tensor in memory of its own.

    What an optimizer is given it writes into, at once and all of it: a mapped file would only be a slower place.
    """
    value = tensors.get(path, value)
    if isinstance(value, Tensor):
        return value.clone() if value.device.type == "cpu" else value
    if isinstance(value, dict):
        items = ((key, _put_back(item, f"{path}[{key!r}]", tensors)) for key, item in value.items())
        return type(value)(items) if type(value) in (dict, OrderedDict) else value
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_put_back(item, f"{path}[{index}]", tensors) for index, item in enumerate(value))
    return value


def _with_similar(keys: list[str], candidates: list[str]) -> dict[str, list[str]]:
    return {key: _similar(key, candidates) for key in keys}


def _similar(key: str, candidates: list[str]) -> list[str]:
    """Keys that differ by a prefix, as those of a wrapped module do; else the nearest by spelling."""
    by_prefix = [other for other in candidates if other.endswith(f".{key}") or key.endswith(f".{other}")]
    return by_prefix[:1] or difflib.get_close_matches(key, candidates[:1000], n=1, cutoff=0.7)


def _list(title: str, keys: dict[str, list[str]]) -> list[str]:
    if not keys:
        return []
    hints = [f"    {key}" + (f" (similar: {similar[0]})" if similar else "") for key, similar in keys.items()]
    return [f"  {title} ({len(keys)}):", *hints]


def _mismatch(module: torch.nn.Module, text: str) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"the checkpoint does not fit {type(module).__name__}:\n{text}\nTo load what fits, pass strict=False."
    )


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _enumerate(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
