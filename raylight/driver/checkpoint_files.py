"""CheckpointFiles: the single files that ModelCheckpoints want, made of committed checkpoints behind the loop."""

from __future__ import annotations

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from raylight.contract.errors import StorageError
from raylight.contract.messages import FileDropped, FileOrder, FileOrders, FileWanted, LinkWanted
from raylight.driver.run_record import describe_error
from raylight.storage.checkpoints import Checkpoint
from raylight.storage.local_files import HIDDEN_PREFIX


class FileMaker(ABC):
    """Writes and deletes single files; the driver knows no torch."""

    @abstractmethod
    def write(self, checkpoint: Checkpoint, wanted: FileWanted) -> list[str]:
        """Writes the file, whole or not at all. Returns the names of hyperparameters that it cannot hold."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Deletes the file; it may be gone already."""


class CheckpointFiles:
    """Orders wait for their checkpoint, and are then done one after the other by a thread of their own.

    A checkpoint that files are still made of is not deleted. A file that cannot be written costs a warning, and so the
    one that it would take the place of stays.
    """

    def __init__(self, maker: FileMaker | None, warn: Callable[[str], None], after: Callable[[], None]):
        """`after` is called on that thread when a checkpoint is not needed here any more."""
        self._maker, self._warn, self._after = maker, warn, after
        self._left_out: set[str] = set()
        self._waiting: dict[str, list[FileOrders]] = {}  # by the name of the checkpoint's folder
        self._ready: list[FileOrders] = []  # to be done, or being done
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []

    @property
    def needed(self) -> set[str]:
        """Names of checkpoints that files are still made of."""
        return {_name_of(orders) for orders in [*self._ready]} | {*self._waiting}

    def wanted_of(self, directory: str) -> tuple[FileWanted, ...]:
        """The files that wait for the checkpoint in `directory`."""
        waiting = self._waiting.get(directory.rpartition("/")[2], [])
        return tuple(order for orders in waiting for order in orders.orders if isinstance(order, FileWanted))

    def add(self, orders: FileOrders, committed: Checkpoint | None) -> None:
        """`committed`: their checkpoint, if it is on storage already."""
        if committed is None:
            self._waiting.setdefault(_name_of(orders), []).append(orders)
        else:
            self._begin(orders, committed)

    def note_commit(self, checkpoint: Checkpoint) -> None:
        for orders in self._waiting.pop(checkpoint.name, []):
            self._begin(orders, checkpoint)

    def wait(self) -> None:
        """Returns once all files are written whose checkpoint is on storage."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def close(self) -> None:
        """Returns once all files are written; those whose checkpoint did not come are named."""
        self.wait()
        for waiting in self._waiting.values():
            for orders in waiting:
                self._give_up(orders.orders, f"there is no checkpoint of step {orders.step}")
        self._waiting.clear()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _begin(self, orders: FileOrders, checkpoint: Checkpoint) -> None:
        self._ready.append(orders)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="raylight files")
        self._jobs.append(self._thread.submit(self._do, orders, checkpoint))

    def _do(self, orders: FileOrders, checkpoint: Checkpoint) -> None:
        dropped = {order.path for later in self._ready[1:] for order in later.orders if isinstance(order, FileDropped)}
        for number, order in enumerate(orders.orders):
            if _leads_to(order) in dropped:
                continue  # another takes its place at once
            try:
                self._do_one(order, checkpoint)
            except Exception as error:
                self._give_up(orders.orders[number:], describe_error(error))
                break
        self._ready.remove(orders)
        self._after()

    def _do_one(self, order: FileOrder, checkpoint: Checkpoint) -> None:
        assert self._maker is not None
        if isinstance(order, FileWanted):
            self._say_left_out(order.path, self._maker.write(checkpoint, order))
        elif isinstance(order, LinkWanted):
            link(order.path, order.target)
        else:
            self._maker.remove(order.path)

    def _say_left_out(self, path: str, names: list[str]) -> None:
        if new := {*names} - self._left_out:
            self._left_out |= new
            self._warn(f"{path} does not hold {', '.join(sorted(new))}, which have no plain form")

    def _give_up(self, orders: tuple[FileOrder, ...], reason: str) -> None:
        for order in orders:
            if isinstance(order, FileDropped):
                self._warn(f"{order.path} stays, because what takes its place was not written")
            else:
                self._warn(f"{order.path} was not written: {reason}")


def _leads_to(order: FileOrder) -> str | None:
    """The file that there is something of after this order."""
    if isinstance(order, FileDropped):
        return None
    return order.path if isinstance(order, FileWanted) else order.target


def _name_of(orders: FileOrders) -> str:
    return orders.directory.rpartition("/")[2]


def link(path: str, target: str) -> None:
    """A relative link, in one piece; a copy where the file system has no links. What was at `path` is replaced."""
    folder, name = os.path.split(path)
    if os.path.isdir(path) and not os.path.islink(path):
        raise StorageError(f"{path} is a folder, and a link was to take its place")
    aside = os.path.join(folder, f"{HIDDEN_PREFIX}{uuid.uuid4().hex}-{name}")
    try:
        os.symlink(os.path.relpath(target, folder), aside)
    except OSError:
        shutil.copy(target, aside)
    os.replace(aside, path)
