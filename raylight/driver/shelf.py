"""Shelf: the checkpoints of one version: how they come about, which are kept, the best and the last of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from raylight.contract.config import Checkpointing
from raylight.contract.messages import FileWanted, Saved, SaveFailed
from raylight.driver.run_record import describe_error
from raylight.storage import checkpoints as store
from raylight.storage.checkpoints import Checkpoint, Manifest
from raylight.storage.filesystem import Storage
from raylight.storage.retention import best, retain

Shares = dict[int, Saved]
"""Each rank's share of one checkpoint."""


class Shelf:
    """Collects the shares of ranks, commits a checkpoint once all of them are on storage, and deletes old ones.

    `files` is None if nothing is written; `source` is the path of the checkpoint that the run was resumed from.
    """

    def __init__(
        self, files: Storage | None, options: Checkpointing, attempt: int, warn: Callable[[str], None],
        source: str | None = None,
    ):  # fmt: skip
        self._files, self._options, self._attempt, self._warn = files, options, attempt, warn
        self._checkpoints: list[Checkpoint] = store.list_checkpoints(files) if files is not None else []
        self._shares: dict[str, Shares] = {}  # by directory: of checkpoints that some ranks have not written yet
        self._given_up = ""  # the directory of a checkpoint that a group which has shrunk since had begun
        self._source = source
        self._pinned: tuple[str, ...] = ()

    # ---- reading

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return list(self._checkpoints)

    @property
    def best(self) -> Checkpoint | None:
        return best(self._checkpoints, self._options.monitor, self._options.mode)

    @property
    def last(self) -> Checkpoint | None:
        return max(self._checkpoints, key=lambda checkpoint: checkpoint.age_key, default=None)

    @property
    def is_waiting(self) -> bool:
        """Whether a checkpoint lacks the shares of some ranks."""
        return bool(self._shares)

    # ---- shares

    def add(self, rank: int, share: Saved, world_size: int) -> Shares | None:
        """The shares of a checkpoint to commit, if this was the last that it lacked. `world_size`: of the group as it
        is now."""
        if share.world_size > world_size:
            self._give_up(share, world_size)
            return None
        shares = self._shares.setdefault(share.directory, {})
        shares[rank] = share
        fitting = {rank: one for rank, one in shares.items() if one.world_size == share.world_size}
        if len(fitting) < share.world_size:
            return None
        del self._shares[share.directory]
        return fitting

    def _give_up(self, share: Saved, world_size: int) -> None:
        """The group has shrunk since, so the share of a rank that is gone will not come. The person reads it once."""
        if share.directory != self._given_up:
            self._given_up = share.directory
            self._warn(
                f"the checkpoint of step {share.step} is lost: {share.world_size} workers had begun it, and "
                f"{world_size} are left. Training goes on; earlier checkpoints are whole."
            )

    def drop_failed(self, rank: int, failed: SaveFailed, is_ending: bool) -> None:
        """A rank could not write its share. `is_ending`: nothing is trained after it."""
        self._shares.pop(failed.directory, None)
        self._warn(
            f"rank {rank} could not write its share of the checkpoint of step {failed.step}: "
            f"{failed.reason.rstrip('.')}. "
            + ("Earlier" if is_ending else "Training goes on; earlier")
            + " checkpoints are whole."
        )

    def begin_generation(self) -> None:
        """Shares that the ranks of the last generation had written belong to no checkpoint."""
        self._shares.clear()

    # ---- storage

    def commit(self, shares: Shares, seed: int | None, wanted: tuple[FileWanted, ...] = ()) -> Checkpoint:
        """Writes the manifest, which makes it a checkpoint. Raises Superseded, or what storage raises."""
        assert self._files is not None
        first = shares[min(shares)]
        manifest = Manifest(
            step=first.step,
            epoch=first.epoch,
            attempt=self._attempt,
            world_size=first.world_size,
            files=tuple(file for rank in sorted(shares) for file in shares[rank].files),
            metrics=first.metrics,
            weights_only=first.weights_only,
            seed=seed,
            carried=first.carried,
            wanted=wanted,
        )
        committed = store.commit(self._files, first.directory, manifest)
        self._checkpoints = [c for c in self._checkpoints if c.path != committed.path] + [committed]
        return committed

    def find(self, directory: str) -> Checkpoint | None:
        """The checkpoint in `directory` of the version, if it is committed and kept."""
        name = directory.rpartition("/")[2]
        return next((checkpoint for checkpoint in self._checkpoints if checkpoint.name == name), None)

    def retain(self, needed: Collection[str] = ()) -> None:
        """Deletes the checkpoints that are not kept, save for those whose name is `needed`. One that cannot be deleted
        costs a warning."""
        options = self._options
        protected = {*self._pinned, *needed, *([self._source] if self._source is not None else [])}
        extra = retain(
            self._checkpoints, options.keep_best, options.keep_last, options.monitor, options.mode, protected
        )
        for checkpoint in extra:
            try:
                store.delete(checkpoint)
            except Exception as error:
                self._warn(f"a checkpoint that is not needed any more stays on storage: {describe_error(error)}")
        gone = {checkpoint.path for checkpoint in extra}
        self._checkpoints = [c for c in self._checkpoints if c.path not in gone]

    def list_again(self) -> None:
        """After somebody has deleted the version: what is still on storage."""
        if self._files is not None:
            self._checkpoints = store.list_checkpoints(self._files)

    def redo_from(self, step: int) -> None:
        """Checkpoints beyond `step` are damaged or of no use: they count for nothing, and stay on storage for a person
        to look at."""
        self._shares.clear()
        self._checkpoints = [checkpoint for checkpoint in self._checkpoints if checkpoint.step <= step]

    # ---- what is never deleted

    def start_from(self, checkpoint: Checkpoint) -> None:
        """The run goes on from this checkpoint, which is kept instead of the one that it went on from before."""
        self._source = checkpoint.path

    def pin(self, paths: Iterable[str]) -> None:
        """Keeps the checkpoints that others have learnt of, instead of those that were pinned before."""
        self._pinned = tuple(paths)
