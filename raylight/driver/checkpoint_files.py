"""CheckpointFiles: the single files that ModelCheckpoints want, made of committed checkpoints behind the loop."""

from __future__ import annotations

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
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

    def __init__(
        self, maker: FileMaker | None, warn: Callable[[str], None], after: Callable[[], None],
        tell: Callable[[FileWanted], None],
    ):  # fmt: skip
        """On that thread `after` is called when a checkpoint is not needed here any more, and `tell` for each file that
        was written."""
        self._maker, self._warn, self._after, self._tell = maker, warn, after, tell
        self._left_out: set[str] = set()
        self._waiting: dict[str, list[FileOrders]] = {}  # by the name of the checkpoint's folder
        self._lost: list[FileOrders] = []  # their checkpoint will not come; the next one has to do
        self._ready: list[tuple[FileOrders, Checkpoint]] = []  # to be done, the first of them now
        self._put_off: list[FileDropped] = []  # of orders whose file was passed over: until the one after it is there
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []

    @property
    def needed(self) -> set[str]:
        """Names of checkpoints that files are still made of."""
        return {checkpoint.name for _, checkpoint in [*self._ready]} | {*self._waiting}

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

    def note_lost(self, directory: str | None = None) -> None:
        """The checkpoint in `directory`, or any that is waited for, will not come."""
        names = [*self._waiting] if directory is None else [directory.rpartition("/")[2]]
        self._lost += [orders for name in names for orders in self._waiting.pop(name, [])]

    def redo_from(self, step: int) -> None:
        """The steps after this one are made again, and their files are asked for again."""
        self.note_lost()
        self._lost = [orders for orders in self._lost if orders.step <= step]

    def note_commit(self, checkpoint: Checkpoint) -> None:
        due = [orders for orders in self._lost if orders.step <= checkpoint.step]
        self._lost = [orders for orders in self._lost if orders.step > checkpoint.step]
        for orders in due:
            if _name_of(orders) != checkpoint.name:
                paths = ", ".join(order.path for order in orders.orders if isinstance(order, FileWanted))
                self._warn(f"the state of step {orders.step} is lost; that of step {checkpoint.step} goes to {paths}")
            self._begin(orders, checkpoint)
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
        self.note_lost()
        lost, self._lost = self._lost, []
        for orders in lost:
            self._give_up(orders.orders, f"there is no checkpoint of step {orders.step}")
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _begin(self, orders: FileOrders, checkpoint: Checkpoint) -> None:
        self._ready.append((orders, checkpoint))
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="raylight files")
        self._jobs.append(self._thread.submit(self._do, orders, checkpoint))

    def _do(self, orders: FileOrders, checkpoint: Checkpoint) -> None:
        todo = self._pass_over(orders.orders)
        for number, order in enumerate(todo):
            try:
                self._do_one(order, checkpoint)
            except Exception as error:
                self._give_up(todo[number:], describe_error(error))
                break
        del self._ready[0]
        self._after()

    def _pass_over(self, orders: tuple[FileOrder, ...]) -> list[FileOrder]:
        """What is left of orders without the files that others, which are ready too, take the place of at once."""
        later = [order for others, _ in self._ready[1:] for order in others.orders]
        dropped = {order.path for order in later if isinstance(order, FileDropped)}
        left = [order for order in orders if _leads_to(order) not in dropped]
        if len(left) == len(orders):
            put_off, self._put_off = self._put_off, []
            return [*orders, *put_off]
        self._put_off += [order for order in left if isinstance(order, FileDropped)]
        return [order for order in left if not isinstance(order, FileDropped)]

    def _do_one(self, order: FileOrder, checkpoint: Checkpoint) -> None:
        assert self._maker is not None
        if isinstance(order, FileWanted):
            self._say_left_out(order.path, self._maker.write(checkpoint, order))
            self._tell(order)
        elif isinstance(order, LinkWanted):
            link(order.path, order.target)
        else:
            self._maker.remove(order.path)

    def _say_left_out(self, path: str, names: list[str]) -> None:
        if new := {*names} - self._left_out:
            self._left_out |= new
            self._warn(f"{path} does not hold {', '.join(sorted(new))}, which have no plain form")

    def _give_up(self, orders: Iterable[FileOrder], reason: str) -> None:
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
