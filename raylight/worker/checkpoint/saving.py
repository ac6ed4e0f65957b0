"""Saving: which checkpoint of this rank is on its way, how far that is, and whether another was asked for."""

from __future__ import annotations

from raylight.contract.messages import FileDropped, FileOrder, Message
from raylight.contract.task import Files
from raylight.worker.checkpoint.snapshot import Snapshots
from raylight.worker.outbox import Outbox


class Saving:
    """The snapshots of one rank, None where a run makes none, and what its loop remembers of them."""

    def __init__(self) -> None:
        self.snapshots: Snapshots | None = None
        self.saved_at = -1
        """Batches seen at the newest snapshot."""
        self.is_requested = False
        """A checkpoint was asked for, by a hook or the driver, and is not made yet."""
        self.orders: list[FileOrder] = []
        """Of the state as it is now; they are sent with its checkpoint."""
        self._wanted: dict[str, bool] = {}  # paths of files that were wanted, or dropped
        self._unsaved: set[str] = set()
        self._said_left_out = False

    @property
    def has_failed(self) -> bool:
        """Whether the newest snapshot has ended and is not on storage."""
        return self.snapshots is not None and self.snapshots.has_failed

    def begin(self, files: Files, rank: int, world_size: int) -> None:
        self.snapshots = Snapshots(files, rank, world_size)

    def move(self, rank: int, world_size: int) -> None:
        if self.snapshots is not None:
            self.snapshots.move(rank, world_size)

    def request(self) -> None:
        self.is_requested = True

    def drop_request(self) -> None:
        self.is_requested = False

    def order(self, order: FileOrder) -> None:
        """Asks for a file, and for the checkpoint that it is made of."""
        self.orders.append(order)
        self._wanted[order.path] = not isinstance(order, FileDropped)
        self.request()

    def is_wanted(self, path: str) -> bool | None:
        """Whether a file will be at this path; None if none was asked for."""
        return self._wanted.get(path)

    def take_orders(self) -> tuple[FileOrder, ...]:
        taken, self.orders = tuple(self.orders), []
        return taken

    def note_saved(self, num_batches_seen: int) -> None:
        self.saved_at, self.is_requested = num_batches_seen, False

    def name_unsaved(self, unsaved: dict[str, str], outbox: Outbox) -> None:
        """Names hyperparameters that no checkpoint can hold, with the reason, each once."""
        for name in unsaved.keys() - self._unsaved:
            self._unsaved.add(name)
            outbox.notice(
                f"hyperparameter {name!r} is not in the checkpoints, which cannot hold it: {unsaved[name]}. "
                f"load_from_checkpoint will ask for it, as {name}=..."
            )

    def name_left_out(self, left_out: dict[str, str], outbox: Outbox) -> None:
        """Names what user code put into a checkpoint and no file can hold, with the reason, each once."""
        for name in left_out.keys() - self._unsaved:
            self._unsaved.add(name)
            outbox.notice(f"{name!r} is not in the checkpoints, as it cannot be pickled: {left_out[name]}", "warning")

    def finish_copying(self) -> bool:
        """Returns once weights and optimizer state may change; False if user code has changed them already."""
        return self.snapshots is None or self.snapshots.wait()

    def say_left_out(self, step: int, outbox: Outbox) -> None:
        """Names a checkpoint that is not made because the one before is in flight; the first alone."""
        if not self._said_left_out:
            self._said_left_out = True
            outbox.notice(
                f"the checkpoint of step {step} is left out, as the one before is still being written; others may be "
                "too. With keep_last=-1 or keep_best=-1 training waits, and each one is made.", "warning",
            )  # fmt: skip

    def poll(self) -> list[Message]:
        """What has become of snapshots since the last call."""
        return list(self.snapshots.poll()) if self.snapshots is not None else []

    def close(self, timeout_s: float) -> list[Message]:
        """Waits for the write in flight."""
        return list(self.snapshots.close(timeout_s)) if self.snapshots is not None else []
