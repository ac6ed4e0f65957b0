"""Checkpoints: committed by their manifest, which is written last and deleted first."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO

from raylight.contract.errors import CheckpointCorrupt, MissingFile, StorageError, Superseded
from raylight.contract.layout import CHECKPOINT_FOLDER, CHECKPOINTS, MANIFEST_FILE
from raylight.contract.messages import SavedFile
from raylight.storage.digests import digest_of_file
from raylight.storage.fence import Fence, check_attempt, read_fence, write_fence
from raylight.storage.filesystem import Storage
from raylight.storage.local_files import HIDDEN_PREFIX
from raylight.storage.manifest import Manifest, check_inside

__all__ = [
    "Checkpoint", "Manifest", "check_there", "check_whole", "commit", "committed_folders", "delete",
    "find_checkpoint", "first_whole", "list_checkpoints", "newest_whole", "raise_fence",
    "read_checkpoint", "sweep_leftovers", "verify",
]  # fmt: skip

logger = logging.getLogger("raylight.storage")
# The files that raylight writes, and therefore may delete; no others are touched.
OWN_FILE = re.compile(
    rf"{re.escape(MANIFEST_FILE)}|mod(el|ule)\.pt|[a-z_]+-\d{{5,}}-of-\d{{5,}}\.pt|{re.escape(HIDDEN_PREFIX)}.+"
)
# A shared file system may show another machine's files a little late.
ARRIVAL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `storage` is rooted at its folder; file names are relative to it. Can be pickled."""

    storage: Storage
    manifest: Manifest

    @property
    def name(self) -> str:
        """The folder's name, as "step-00001200"."""
        return self.storage.name

    @property
    def path(self) -> str:
        """The folder as a person would write it."""
        return self.storage.uri

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def epoch(self) -> int:
        return self.manifest.epoch

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.manifest.metrics)

    @property
    def size(self) -> int:
        return self.manifest.size

    @property
    def file_names(self) -> tuple[str, ...]:
        return tuple(file.path for file in self.manifest.files)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.file_names)

    @property
    def age_key(self) -> tuple[int, int, float]:
        """A key that sorts checkpoints of a version from the oldest to the newest."""
        return self.manifest.step, self.manifest.attempt, self.manifest.time

    def open_read(self, name: str) -> BinaryIO:
        self._check_name(name)
        return self.storage.open_read(name)

    def local_path(self, name: str) -> str | None:
        self._check_name(name)
        return self.storage.local_path(name)

    def _check_name(self, name: str) -> None:
        """Raises CheckpointCorrupt for a file that is not in the manifest, or a link that leads out of the folder."""
        if name not in self._names:
            raise CheckpointCorrupt(f"{self.path} has no file {name!r}. Its files: {_listed(list(self.file_names))}.")
        path = self.storage.local_path(name)
        if path is not None and ("/" in name or os.path.islink(path)):
            folder = os.path.realpath(self.storage.local_path() or "")
            if os.path.commonpath([folder, os.path.realpath(path)]) != folder:
                raise CheckpointCorrupt(f"{self.path}: {name} is a link that leaves the checkpoint's folder.")


def commit(version: Storage, directory: str, manifest: Manifest, fence: int | None = None) -> Checkpoint:
    """Makes a checkpoint exist: writes the manifest of files that are all on storage, in `directory` of the version.

    `fence` is the attempt that commits if that is not the manifest's: survivors may finish what an earlier attempt
    began. Raises StorageError if a file is missing or has another size, or if a newer attempt has begun; nothing is
    committed then. If storage fails after the write, the manifest that is there decides.
    """
    attempt = manifest.attempt if fence is None else fence
    check_inside(directory)
    manifest = replace(manifest.with_paths_relative_to(directory), attempt=attempt)
    folder = version.child(directory)
    check_attempt(version, attempt)
    _check_arrived(folder, manifest.files)
    content = manifest.to_bytes()
    try:
        folder.write(MANIFEST_FILE, [content])
        check_attempt(version, attempt)
    except Superseded:
        raise
    except StorageError:
        if not _has_arrived(folder, content):
            raise
        check_attempt(version, attempt)
    return Checkpoint(folder, manifest)


def _has_arrived(folder: Storage, manifest: bytes) -> bool:
    """Whether the manifest is there: a write may have succeeded though its answer is lost."""
    try:
        return folder.read_bytes(MANIFEST_FILE) == manifest
    except StorageError:
        return False


def _check_arrived(folder: Storage, files: Collection[SavedFile]) -> None:
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    wait_s = 0.05
    while True:
        sizes = {entry.name: entry.size for entry in folder.walk()}
        wrong = [file for file in files if sizes.get(file.path) != file.size]
        if not wrong:
            return
        if time.monotonic() > deadline:
            raise StorageError(
                f"{folder.uri} is not committed: {_listed([_size_problem(file, sizes) for file in wrong])}.\n"
                "The workers reported these files as written. Check that they see the same storage as the driver."
            )
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 1.0)


def list_checkpoints(version: Storage) -> list[Checkpoint]:
    """The committed checkpoints of a version, oldest first. Damaged manifests and those of a replaced attempt are
    skipped with a warning."""
    fence = read_fence(version)
    found = version.map(lambda name: _read_or_warn(version, name, fence), _folders(version))
    return sorted((checkpoint for checkpoint in found if checkpoint is not None), key=lambda it: it.age_key)


def _folders(version: Storage) -> list[str]:
    return [entry.name for entry in version.list(CHECKPOINTS) if entry.is_directory]


def committed_folders(version: Storage) -> list[Storage]:
    """Folders that hold a manifest, damaged or not."""
    folders = [version.child(CHECKPOINTS, name) for name in _folders(version)]
    return [folder for folder in folders if folder.exists(MANIFEST_FILE)]


def _read_or_warn(version: Storage, name: str, fence: Fence) -> Checkpoint | None:
    folder = version.child(CHECKPOINTS, name)
    try:
        checkpoint = read_checkpoint(folder)
    except MissingFile:
        return None  # not committed
    except CheckpointCorrupt as error:
        logger.warning("%s Skipped.", error)
        return None
    if not fence.allows(checkpoint.manifest.attempt, name):
        logger.warning(
            "%s was written by attempt %d after attempt %d had taken over. Skipped.",
            folder.uri, checkpoint.manifest.attempt, fence.attempt,
        )  # fmt: skip
        return None
    return checkpoint


def read_checkpoint(folder: Storage) -> Checkpoint:
    """The checkpoint in a folder; its files are not checked. Raises MissingFile or CheckpointCorrupt."""
    try:
        return Checkpoint(folder, Manifest.from_bytes(folder.read_bytes(MANIFEST_FILE)))
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{folder.uri_of(MANIFEST_FILE)} is damaged: {error}.") from error


def verify(checkpoint: Checkpoint, digests: bool = True, must_answer: bool = False) -> list[str]:
    """The problems of the files, one line each; empty if they are as they were written.

    Sizes are always compared, at the cost of one listing; with `digests` every byte is read. With `must_answer`, remote
    storage that cannot be reached raises StorageError and does not count as damage.
    """
    sizes = {entry.name: entry.size for entry in checkpoint.storage.walk()}
    files = checkpoint.manifest.files
    problems = [_size_problem(file, sizes) for file in files if sizes.get(file.path) != file.size]
    if digests:
        whole = [file for file in files if sizes.get(file.path) == file.size]
        found = checkpoint.storage.map(
            lambda file: _digest_problem(checkpoint, file, must_answer), whole, os.cpu_count() or 1
        )
        problems += [problem for problem in found if problem is not None]
    return problems


def _size_problem(file: SavedFile, sizes: dict[str, int]) -> str:
    if file.path not in sizes:
        return f"{file.path} is missing"
    return f"{file.path} has {sizes[file.path]} bytes instead of {file.size}"


def _digest_problem(checkpoint: Checkpoint, file: SavedFile, must_answer: bool) -> str | None:
    algorithm = file.digest.partition(":")[0]
    try:
        with checkpoint.open_read(file.path) as opened:
            digest = digest_of_file(opened, algorithm)
    except (ValueError, TypeError):  # TypeError for an algorithm whose length has to be given
        return f"{file.path} has a digest of an unknown kind, {algorithm!r}"
    except (StorageError, CheckpointCorrupt, OSError) as error:
        if must_answer and not checkpoint.storage.is_local and not isinstance(error, MissingFile | CheckpointCorrupt):
            raise
        return f"{file.path} cannot be read ({error})"
    return None if digest == file.digest else f"{file.path} has other bytes than were written ({algorithm} differs)"


def newest_whole(version: Storage, digests: bool = True, resumable: bool = False) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were written; damaged ones are skipped with a warning.

    `resumable` leaves out checkpoints that hold only weights.
    """
    newest_first = reversed(list_checkpoints(version))
    return first_whole((it for it in newest_first if not (resumable and it.manifest.weights_only)), digests)


def first_whole(checkpoints: Iterable[Checkpoint], digests: bool = True) -> Checkpoint | None:
    """The first checkpoint whose files are as they were written; damaged ones are skipped with a warning."""
    for checkpoint in checkpoints:
        problems = verify(checkpoint, digests, must_answer=True)
        if not problems:
            return checkpoint
        logger.warning("%s is damaged: %s. Skipped for another one.", checkpoint.path, _listed(problems))
    return None


def find_checkpoint(path: str | os.PathLike[str], filesystem: Any = None, digests: bool = True) -> Checkpoint:
    """The checkpoint at a path or URI of its folder (or of its manifest), verified.

    Raises CheckpointCorrupt with the problems, or MissingFile if there is nothing.
    """
    folder = Storage(path, filesystem)
    if folder.name == MANIFEST_FILE:
        folder = folder.parent()
    try:
        checkpoint = read_checkpoint(folder)
    except MissingFile:
        raise _nothing_committed(folder) from None
    return check_whole(checkpoint, digests)


def check_whole(checkpoint: Checkpoint, digests: bool = True) -> Checkpoint:
    """The same checkpoint. Raises CheckpointCorrupt with the problems of its files, or MissingFile if it has been
    deleted."""
    if problems := verify(checkpoint, digests):
        check_there(checkpoint)
        raise CheckpointCorrupt(
            f"{checkpoint.path} is damaged: {_listed(problems)}.\n"
            "Use another checkpoint of the version, or resume='last', which takes the newest whole one."
        )
    return checkpoint


def check_there(checkpoint: Checkpoint) -> None:
    """Raises MissingFile if the checkpoint has been deleted since it was found, as a running run does with those it no
    longer needs. Call it when files are not as they should be."""
    if not checkpoint.storage.exists(MANIFEST_FILE):
        raise MissingFile(f"{checkpoint.path} has been deleted since, as a running run does. Use another one.")


def _nothing_committed(folder: Storage) -> CheckpointCorrupt | MissingFile:
    entries = folder.list()
    if not entries:
        there = _folders(folder.parent().parent()) if folder.parent().name == CHECKPOINTS else []
        beside = f" Beside it: {_listed(there)}." if there else ""
        return MissingFile(f"there is no checkpoint at {folder.uri}.{beside}")
    if names := _folders(folder):
        paths = "\n".join(f"  {folder.child(CHECKPOINTS, name).uri}" for name in names)
        return MissingFile(f"{folder.uri} is a version, not a checkpoint. Name one of its checkpoints:\n{paths}")
    return CheckpointCorrupt(
        f"{folder.uri} was never finished: it has no {MANIFEST_FILE}, only {_listed([it.name for it in entries])}."
    )


def delete(checkpoint: Checkpoint) -> None:
    """Deletes a checkpoint, its manifest first: a kill in between leaves leftovers, never half a checkpoint. A folder
    whose name is not raylight's stays, and so do files in it that are not. Raises StorageError if a link leads there.
    """
    version = checkpoint.storage.parent().parent()
    _delete_folder(version, checkpoint.name, checkpoint.file_names)


def _delete_folder(version: Storage, name: str, files: Collection[str] = ()) -> bool:
    """Returns False if the folder stays because raylight has not made it or something in it."""
    if not CHECKPOINT_FOLDER.fullmatch(name):
        return False
    path = f"{CHECKPOINTS}/{name}"
    version.delete(f"{path}/{MANIFEST_FILE}")
    stays = version.delete_own(path, lambda file: file in files or OWN_FILE.fullmatch(file) is not None)
    if stays:
        logger.warning(
            "%s stays on storage, because it holds things that raylight has not written: %s.",
            version.uri_of(path), _listed(stays),
        )  # fmt: skip
    return not stays


def raise_fence(version: Storage, attempt: int) -> None:
    """Shuts out older attempts, which commit nothing from here on. Call it once, before the workers of `attempt`
    begin."""
    before = read_fence(version)
    check_attempt(version, attempt)
    if before.attempt == attempt and before.committed is not None:
        return
    write_fence(version, Fence(attempt, None))
    committed = [it.name for it in list_checkpoints(version) if before.allows(it.manifest.attempt, it.name)]
    write_fence(version, Fence(attempt, frozenset(committed)))


def sweep_leftovers(version: Storage, keep: Collection[str] = ()) -> list[str]:
    """Removes what dead attempts left: checkpoints without a manifest, and those that the fence shuts out. Links and
    folders with other names are not raylight's, and stay.

    Call it after `raise_fence`, when no writer of an older attempt matters any longer. `keep` holds names or
    version-relative paths of folders that are being written. Returns the names that were removed.
    """
    fence = read_fence(version)
    kept = {name.rpartition("/")[2] for name in keep}
    leftovers = [name for name in _folders(version) if name not in kept and _is_leftover(version, name, fence)]
    gone = []
    for name in leftovers:
        try:
            if _delete_folder(version, name):
                gone.append(name)
        except StorageError as error:
            logger.warning("leftovers of a dead attempt stay on storage: %s", error)
    return gone


def _is_leftover(version: Storage, name: str, fence: Fence) -> bool:
    if not CHECKPOINT_FOLDER.fullmatch(name):
        return False
    if version.is_link(CHECKPOINTS) or version.is_link(f"{CHECKPOINTS}/{name}"):
        return False
    try:
        checkpoint = read_checkpoint(version.child(CHECKPOINTS, name))
    except MissingFile:
        return True
    except CheckpointCorrupt:
        return False  # a person may want to save what can be saved
    return not fence.allows(checkpoint.manifest.attempt, name)


def _listed(texts: list[str], most: int = 5) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
