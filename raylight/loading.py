"""From a checkpoint back to a module or to a run that goes on."""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from raylight.contract.config import Filesystem
from raylight.contract.errors import CheckpointCorrupt, CheckpointMismatch, InvalidArguments, MissingFile, StorageError
from raylight.contract.kinds import Value
from raylight.contract.layout import CHECKPOINTS, MANIFEST_FILE
from raylight.storage.checkpoints import (
    Checkpoint,
    check_whole,
    committed_folders,
    find_checkpoint,
    first_whole,
    list_checkpoints,
    newest_whole,
    read_checkpoint,
)
from raylight.storage.filesystem import Storage
from raylight.storage.json_text import parse_object
from raylight.storage.retention import rank
from raylight.storage.summaries import monitor_of, read_run_or_status
from raylight.storage.versions import Version, list_versions
from raylight.user.checkpoint_reader import CheckpointPath, MapLocation
from raylight.user.given_hyperparameters import INSTANTIATOR

if TYPE_CHECKING:
    from raylight.driver.result import Result
    from raylight.worker.checkpoint.kept_hyperparameters import Kept

M = TypeVar("M")
POINTER_FILE = "raylight.json"
INSTANTIATORS = (
    "raylight.cli.instantiate_module", "lightning.pytorch.cli.instantiate_module",
    "pytorch_lightning.cli.instantiate_module",
)  # fmt: skip
"""The functions that a configuration among hyperparameters may name; all stand for raylight's."""


@dataclass(frozen=True, slots=True)
class Resume:
    """The point from which a run continues. `version` is set if the run becomes the next attempt of that version."""

    checkpoint: Checkpoint | None = None
    version: Version | None = None
    seed: int | None = None
    notice: str = ""
    takes_new_hyperparameters: bool = False
    """Whether the present options of optimizers and schedulers replace the checkpoint's if they differ; otherwise the
    checkpoint's stay, as in Lightning."""
    lightning_file: str | None = None
    """The file with the weights to evaluate, instead of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """The location of a trial's checkpoint: all that a checkpoint of Ray Tune holds, so that nothing is copied."""

    trial_id: str
    version: int
    checkpoint: str
    path: str
    """As a person would write it."""

    def write(self, folder: str) -> None:
        with open(os.path.join(folder, POINTER_FILE), "w") as file:
            json.dump(asdict(self), file)

    @classmethod
    def read(cls, folder: str) -> Pointer:
        path = os.path.join(folder, POINTER_FILE)
        try:
            with open(path, "rb") as file:
                content = parse_object(file.read())
            kinds = {"trial_id": str, "version": int, "checkpoint": str, "path": str}
            if content.keys() != kinds.keys() or not all(isinstance(content[name], kinds[name]) for name in kinds):
                raise ValueError("an entry is missing or of the wrong kind")
        except (OSError, ValueError) as error:
            raise CheckpointCorrupt(f"{path} does not say where the checkpoint of a trial lies: {error}") from error
        return cls(**content)

    def find(self, folder: Storage) -> Checkpoint:
        """The checkpoint that it points to.

        `folder` holds the pointer, `<run>/sweep_N/<trial>/<checkpoint>` if raylight made it: it leads to a run that was
        moved, or that is reached through a file system of the caller's.
        """
        run = folder.parent().parent().parent()
        beside = run.child(f"version_{self.version}", CHECKPOINTS, self.checkpoint)
        try:
            return check_whole(read_checkpoint(beside))
        except MissingFile:
            return find_checkpoint(self.path)


def find_resume(
    ckpt_path: CheckpointPath | Resume,
    storage: Storage,
    name: str,
    previous: Result | None = None,
    *,
    stage: str = "fit",
    filesystem: Filesystem = None,
) -> Resume:
    """The point that `resume` or `ckpt_path` means: None, "last", "best", a Checkpoint (Ray Tune's too) or its path.

    A path, or a URI of the same scheme, is one of `filesystem` if that is given. For a fit the checkpoint holds all
    that training needs; to evaluate, the weights are enough, and may be a Lightning file's.
    """
    if ckpt_path is None:
        return Resume()
    if isinstance(ckpt_path, Resume):
        return ckpt_path
    if isinstance(ckpt_path, Checkpoint):
        return Resume(_check_resumable(check_whole(ckpt_path), stage))
    if hasattr(ckpt_path, "as_directory"):
        return Resume(_check_resumable(find_of_tune(ckpt_path), stage))
    if not isinstance(ckpt_path, str | os.PathLike):
        return Resume(checkpoint=ckpt_path, seed=None)
    if ckpt_path == "last":
        return _find_last(storage, name) if stage == "fit" else Resume(_find_newest(storage, name))
    if ckpt_path == "best":
        return Resume(_check_resumable(_find_best(storage, name, previous), stage))
    path = os.fspath(ckpt_path)
    if not _is_lightning_file(path):
        is_elsewhere = "://" in path and path.partition("://")[0] != storage.uri.partition("://")[0]
        checkpoint = find_by_path(path, None if is_elsewhere else filesystem)
        return Resume(_check_resumable(checkpoint, stage))
    if stage == "fit":
        raise InvalidArguments(
            f"{path} is a file of Lightning: the state of its loop and optimizers cannot be continued here. Begin with "
            f"its weights: model = Net.load_from_checkpoint({path!r})"
        )
    return Resume(lightning_file=os.path.abspath(path))


def _check_resumable(checkpoint: Checkpoint, stage: str) -> Checkpoint:
    if stage == "fit" and checkpoint.manifest.weights_only:
        raise CheckpointMismatch(
            f"{checkpoint.path} holds weights alone (save_weights_only=True) and cannot be resumed from. "
            "Begin a new run with them: model = Net.load_from_checkpoint(path)"
        )
    return checkpoint


def find_seed(checkpoint: object) -> int | None:
    """The seed of the run that made the checkpoint; None if neither the checkpoint nor its version says."""
    if not isinstance(checkpoint, Checkpoint):
        return None
    if checkpoint.manifest.seed is not None:
        return checkpoint.manifest.seed
    version = checkpoint.storage.parent().parent()
    try:
        seed = Version(0, version, "").read_run().get("seed")
    except StorageError:
        return None
    return seed if isinstance(seed, int) else None


def _find_last(storage: Storage, name: str) -> Resume:
    versions = list_versions(storage, name)
    for version in reversed(versions):
        checkpoint = newest_whole(version.storage, resumable=True)
        if checkpoint is not None:
            seed = find_seed(checkpoint)
            return Resume(checkpoint, version, seed, f"continues {version.path} at step {checkpoint.step}")
        for weights in list_checkpoints(version.storage)[-1:]:
            _check_resumable(weights, "fit")
    if damaged := [folder.uri for version in versions for folder in committed_folders(version.storage)]:
        raise CheckpointCorrupt(
            f"resume='last': none of the checkpoints of run {name!r} is whole: {', '.join(damaged[-3:])}. "
            "raylight verify says what is wrong; to begin a new version, leave resume out."
        )
    return Resume(
        notice=f"resume='last': run {name!r} in {storage.uri} has no checkpoint yet, and starts from the beginning"
    )


def _find_newest(storage: Storage, name: str) -> Checkpoint:
    whole = (newest_whole(version.storage) for version in reversed(list_versions(storage, name)))
    found = next((checkpoint for checkpoint in whole if checkpoint is not None), None)
    if found is None:
        raise _nothing_whole("last", storage, name)
    return found


def _find_best(storage: Storage, name: str, previous: Result | None) -> Checkpoint:
    """The best whole checkpoint: of the fit just done if there was one, else of the newest version that has any."""
    if previous is not None and previous.version is not None and previous.best_checkpoint is not None:
        found = first_whole(rank(previous.checkpoints, *monitor_of(read_run_or_status(previous.version))))
        if found is None:
            raise CheckpointCorrupt(f"'best': none of the checkpoints of {previous.version.path} is whole")
        return found
    for version in reversed(list_versions(storage, name)):
        found = first_whole(rank(list_checkpoints(version.storage), *monitor_of(read_run_or_status(version))))
        if found is not None:
            return found
    raise _nothing_whole("best", storage, name)


def _nothing_whole(which: str, storage: Storage, name: str) -> InvalidArguments:
    return InvalidArguments(
        f"{which!r}: run {name!r} in {storage.uri} has no whole checkpoint; make one first, or pass a path"
    )


def load_module(
    owner: type[M], path: CheckpointPath, map_location: MapLocation, strict: bool | None, overrides: dict[str, Value]
) -> M:
    """`Module.load_from_checkpoint`."""
    from raylight.worker.checkpoint.kept_hyperparameters import read_hyperparameters
    from raylight.worker.checkpoint.restore import apply_weights, load_any

    saved = _to_saved(path)
    state = load_any(saved, map_location)
    kept = read_hyperparameters(state.module, owner)
    module: Value = _make(owner, kept, overrides)
    hparams = {**kept.values, **overrides}
    progress = {"epoch": saved.epoch, "global_step": saved.step} if isinstance(saved, Checkpoint) else {}
    checkpoint = {
        "state_dict": state.model, "hyper_parameters": hparams, **state.module.get("extra", {}), **progress,
        **state.module.get("progress", {}),
    }  # fmt: skip
    module.on_load_checkpoint(checkpoint)
    apply_weights(module, checkpoint["state_dict"], strict=module.strict_loading if strict is None else strict)
    return module


def load_data_module(owner: type[M], path: CheckpointPath, overrides: dict[str, Value]) -> M:
    """`DataModule.load_from_checkpoint`."""
    from raylight.worker.checkpoint.kept_hyperparameters import DATA_MODULE_KEY, read_hyperparameters
    from raylight.worker.checkpoint.restore import load_any

    kept = read_hyperparameters(load_any(_to_saved(path)).module, owner, DATA_MODULE_KEY)
    return _make(owner, kept, overrides)


def read_plain_hyperparameters(path: str | os.PathLike[str], owner: type) -> dict[str, Value]:
    """The hyperparameters that a checkpoint has kept for a module."""
    from raylight.worker.checkpoint.kept_hyperparameters import read_hyperparameters
    from raylight.worker.checkpoint.restore import load_any

    return read_hyperparameters(load_any(_to_saved(path)).module, owner).values


def _make(owner: type[M], kept: Kept, overrides: dict[str, Value]) -> M:
    """An object with the hyperparameters of a checkpoint; a command line's configuration may be among them."""
    made_by = kept.values.get(INSTANTIATOR)
    if made_by is None:
        return owner(**_accepted(owner, kept, overrides))
    if made_by not in INSTANTIATORS:
        raise CheckpointMismatch(f"the checkpoint is to be read by {made_by!r}; allowed are {INSTANTIATORS}")
    from raylight.instantiation import instantiate_module

    return instantiate_module(owner, kept.arguments(overrides, dict.fromkeys([*kept.values, *kept.missing])))


def _to_saved(path: CheckpointPath) -> CheckpointPath:
    """A Lightning file stays a path; all else becomes a Checkpoint."""
    if hasattr(path, "as_directory"):
        return find_of_tune(path)
    if not isinstance(path, str | os.PathLike):
        return path
    text = os.fspath(path)
    return text if _is_lightning_file(text) else find_by_path(text)


def find_of_tune(checkpoint: CheckpointPath) -> Checkpoint:
    """The checkpoint that one of Ray Tune points to, or that it was made from."""
    is_local = getattr(checkpoint.filesystem, "type_name", "") == "local"
    return find_by_path(checkpoint.path, None if is_local else checkpoint.filesystem)


def find_by_path(path: str, filesystem: Filesystem = None) -> Checkpoint:
    """The checkpoint in a folder, or the one that Ray Tune's folder points to."""
    try:
        return find_checkpoint(path, filesystem)
    except (CheckpointCorrupt, MissingFile):
        folder = Storage(path, filesystem)
        if not folder.exists(POINTER_FILE):
            raise
        return Pointer(**json.loads(folder.read_bytes(POINTER_FILE))).find(folder)


def _is_lightning_file(path: str) -> bool:
    return path.endswith(".ckpt") and os.path.isfile(path)


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


def copy_checkpoint(checkpoint: Checkpoint, path: str, weights_only: bool) -> None:
    """Copies a committed checkpoint to another directory, its manifest last; with `weights_only` without what training
    needs."""
    target, manifest = Storage(path), checkpoint.manifest
    if target.exists(MANIFEST_FILE):
        raise InvalidArguments(f"{path} already holds a checkpoint; name a directory that does not exist")
    if weights_only:
        files = tuple(file for file in manifest.files if not file.path.startswith("training-"))
        manifest = replace(manifest, files=files, weights_only=True)
    for file in manifest.files:
        with checkpoint.open_read(file.path) as source:
            target.write(file.path, iter(lambda: source.read(1 << 24), b""))
    target.write(MANIFEST_FILE, [manifest.to_bytes()])
