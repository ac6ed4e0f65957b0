"""From what a person names to the checkpoint that a run goes on from."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from raylight.contract.config import Filesystem
from raylight.contract.errors import CheckpointCorrupt, CheckpointMismatch, InvalidArguments, MissingFile, StorageError
from raylight.contract.layout import CHECKPOINTS, MANIFEST_FILE
from raylight.storage import single_file
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
from raylight.user.checkpoint_reader import CheckpointPath

if TYPE_CHECKING:
    from raylight.driver.result import Result
    from raylight.user.checkpoint_io import CheckpointIO

POINTER_FILE = "raylight.json"
CHECKPOINT_KINDS = (
    "give the path or URI of a checkpoint or of a file in Lightning's format, such a file opened for reading bytes, or "
    "a Checkpoint, raylight's or Ray Tune's"
)


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
    file: str | bytes | None = None
    """A file in Lightning's format instead of a checkpoint, by path or URI, or its bytes."""
    file_seed: int | None = None
    """Of the run that made the file."""
    trained: tuple[int, int] = (0, 0)
    """The steps and epochs that the file's weights were trained for."""


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
    plugin: CheckpointIO | None = None,
    weights_only: bool | None = None,
) -> Resume:
    """The point that `resume` or `ckpt_path` means: None, "last", "best", a Checkpoint (Ray Tune's too), a path or URI
    of a checkpoint or of a file in Lightning's format, or such a file, opened.

    A path, or a URI of the same scheme, is one of `filesystem` if that is given. For a fit there must be all that
    training needs; to evaluate, the weights are enough. `plugin` reads files.
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
        content = ckpt_path.read() if hasattr(ckpt_path, "read") else None
        if not isinstance(content, bytes):
            raise InvalidArguments(f"ckpt_path={ckpt_path!r}: {CHECKPOINT_KINDS}")
        return _resume_from_file(content, stage, plugin, weights_only)
    if ckpt_path == "last":
        return _find_last(storage, name) if stage == "fit" else Resume(_find_newest(storage, name))
    if ckpt_path == "best":
        return Resume(_check_resumable(_find_best(storage, name, previous), stage))
    path = os.fspath(ckpt_path)
    if "://" in path and path.partition("://")[0] != storage.uri.partition("://")[0]:
        filesystem = None  # it is elsewhere
    if filesystem is None and is_single_file(path, plugin):
        local = (
            Storage(path).local_path() if plugin is None else os.path.abspath(path) if os.path.exists(path) else None
        )
        return _resume_from_file(local or path, stage, plugin, weights_only)
    if filesystem is not None and single_file.is_file(path, filesystem):
        with single_file.open_read(path, filesystem) as file:
            return _resume_from_file(file.read(), stage, plugin, weights_only)
    return Resume(_check_resumable(find_by_path(path, filesystem), stage))


def _resume_from_file(file: str | bytes, stage: str, plugin: CheckpointIO | None, weights_only: bool | None) -> Resume:
    """Reads the file once before any worker starts: what is wrong with it is said then."""
    from raylight.user.checkpoint_io import TorchCheckpointIO
    from raylight.worker.checkpoint.lightning_state import find_facts, load_content, to_state

    where = file if isinstance(file, str) else "the file"
    content = load_content(file, plugin or TorchCheckpointIO(), weights_only=weights_only is not False)
    state = to_state(content, where)
    if stage == "fit" and not state.replicated:
        raise CheckpointMismatch(
            f"{where} holds weights alone and cannot be resumed from. Begin a new run with them: "
            "model = Net.load_from_checkpoint(path)"
        )
    seed, step, epoch = find_facts(content)
    return Resume(file=file, file_seed=seed, trained=(step, epoch))


def is_single_file(path: str, plugin: CheckpointIO | None = None) -> bool:
    """Whether a path or URI is that of a file in Lightning's format, and not of a native checkpoint. With a `plugin` of
    the user's all else than a folder is the plugin's affair."""
    if os.path.basename(path.partition("?")[0].rstrip("/")) == MANIFEST_FILE:
        return False
    try:
        if plugin is not None and not os.path.isdir(path):
            return "://" not in path or not Storage(path).exists(MANIFEST_FILE)
        return single_file.is_file(path)
    except InvalidArguments:  # a place that only the plugin knows
        if plugin is None:
            raise
        return True


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
