"""Snapshots: training state copied into host memory between two steps, and written by a thread behind them.

What an optimizer owns, its parameters and its state, changes in `optimizer.step` alone. So that part, nearly all of
it, is copied while the next batch goes forward and backward; `Snapshots.wait` is called just before the step.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.serialization import config as serialization

from raylight.contract.kinds import StateDict, Value
from raylight.contract.messages import Saved, SavedFile, SaveFailed
from raylight.contract.task import Files
from raylight.worker.checkpoint.host_buffers import HostBuffers
from raylight.worker.checkpoint.plain_values import check_plain
from raylight.worker.checkpoint.staging import Copy, Staging, addresses, share
from raylight.worker.checkpoint.state import State

__all__ = ["Snapshots", "State", "check_plain", "share"]

_CHUNK_BYTES = 64 << 20
_MOST_PADDING = 1 / 64  # of a file
_PAGE_BYTES = 4096  # also where pages are larger: the padding of torch's archive has a length of 16 bits


class Snapshots:
    """The snapshots of one rank, one at a time. All methods are called by the thread that trains.

    `has_failed` says that the newest has ended and is not on storage.
    """

    def __init__(self, files: Files, rank: int, world_size: int):
        self.files, self.rank, self.world_size = files, rank, world_size
        self.has_failed = False
        self._buffers = HostBuffers()
        self._preparation: threading.Thread | None = None
        self._in_one_piece = False  # user code writes into what optimizers own: the copy cannot be put off
        self._in_flight: _Snapshot | None = None
        self._pending: _Snapshot | None = None  # the one in flight, until `wait` has found its copy whole
        self._results: list[Saved | SaveFailed] = []

    def reserve(self, state: State, weights_only: bool, optimizer_owned: Collection[Tensor]) -> None:
        """Make the host buffers in the background: call it once, after the first step, when the state has its size.

        Without it the first snapshot makes them, and stands still for about ten copies. Raises as `take` does.
        """
        self._stage(state, weights_only, optimizer_owned)
        self._preparation = threading.Thread(target=self._buffers.prepare, name="snapshot-buffers", daemon=True)
        self._preparation.start()

    def take(
        self,
        directory: str,
        step: int,
        epoch: int,
        state: State,
        metrics: dict[str, float],
        weights_only: bool,
        optimizer_owned: Collection[Tensor],
        wait: bool = False,
        carried: dict[str, int] | None = None,
    ) -> bool:
        """Take a snapshot, to be written to `directory`, and return True.

        While the one before is still being written, nothing is taken and False is returned; with `wait`, for the
        last snapshot of a run, that write is waited for and all is copied before the return. Raises
        `InvalidArguments` naming every value that a checkpoint cannot hold.
        """
        started = time.perf_counter()
        if not self._make_room(wait):
            return False
        if self._preparation is not None:
            self._preparation.join()
            self._preparation = None
        snapshot = _Snapshot(directory, step, epoch, dict(metrics), weights_only, self.world_size, carried or {})
        snapshot.contents, copies = self._stage(state, weights_only, optimizer_owned)
        self._buffers.prepare()
        snapshot.versions = [(tensor, tensor._version) for tensor in optimizer_owned]
        snapshot.start_copying(copies, in_one_piece=wait or self._in_one_piece)
        snapshot.thread = threading.Thread(target=snapshot.write, args=(self.files,), name="snapshot", daemon=True)
        snapshot.stall_s = time.perf_counter() - started
        snapshot.thread.start()
        self._in_flight = self._pending = snapshot
        self.has_failed = False
        return True

    def wait(self) -> bool:
        """Wait until what optimizers own is copied; call it before each `optimizer.step`.

        Returns False where user code has written into it meanwhile: that snapshot is thrown away, `poll` reports
        it as failed, and from then on snapshots are taken in one piece.
        """
        if self._pending is None:
            return True
        snapshot, self._pending = self._pending, None
        if snapshot.finish_copying():
            return True
        self._in_one_piece = True
        return False

    @property
    def busy(self) -> bool:
        """Whether a snapshot is still being written, as of the last `poll`."""
        return self._in_flight is not None

    def poll(self) -> list[Saved | SaveFailed]:
        """Return what has become of snapshots since the last call, without waiting."""
        snapshot = self._in_flight
        if snapshot is not None:
            if self._pending is not None and snapshot.copied.is_set():
                self.wait()
            if self._pending is None and (snapshot.is_abandoned or not snapshot.thread.is_alive()):
                self._in_flight, self.has_failed = None, snapshot.reason is not None
                if snapshot.reason is not None:
                    failed = SaveFailed(snapshot.directory, snapshot.step, snapshot.reason, snapshot.is_torn)
                    self._results.append(failed)
                else:
                    self._results.append(Saved(
                        snapshot.directory, snapshot.step, snapshot.epoch, tuple(snapshot.files), snapshot.metrics,
                        snapshot.weights_only, snapshot.stall_s, snapshot.write_s, snapshot.world_size,
                        snapshot.carried,
                    ))  # fmt: skip
        results, self._results = self._results, []
        return results

    def close(self, timeout_s: float = 600.0) -> list[Saved | SaveFailed]:
        """Wait for the write in flight, give it up after `timeout_s` seconds, and return what `poll` would."""
        snapshot = self._in_flight
        if snapshot is not None:
            self.wait()
            snapshot.thread.join(timeout_s)
            if snapshot.thread.is_alive():
                snapshot.reason = f"it was not written within {timeout_s:g} s of the end of the run"
                snapshot.is_abandoned = True
        return self.poll()

    def move(self, rank: int, world_size: int) -> None:
        """Take another place in another group: what was written in the old one is no share of that group's."""
        self.rank, self.world_size = rank, world_size
        reason = "it was not committed when the group was made anew"
        self._results = [
            SaveFailed(result.directory, result.step, reason) if isinstance(result, Saved) else result
            for result in self._results
        ]
        if self._in_flight is not None and self._in_flight.reason is None:
            self._in_flight.reason = reason

    def _make_room(self, wait: bool) -> bool:
        snapshot = self._in_flight
        if snapshot is None:
            return True
        if wait:
            self.wait()
        if wait or snapshot.reason is not None:  # thrown away: its writer stops at the next chunk
            snapshot.thread.join()
        self._results = self.poll()
        return self._in_flight is None

    def _stage(
        self, state: State, weights_only: bool, optimizer_owned: Collection[Tensor]
    ) -> tuple[StateDict, list[Copy]]:
        staging = Staging(self._buffers, self.rank, self.world_size, addresses(optimizer_owned))
        contents = staging.run(state, weights_only)
        if not weights_only:  # a checkpoint of weights alone leaves the buffers of the next whole one
            self._buffers.keep(staging.targets)
        return contents, staging.copies


@dataclass(slots=True)
class _Snapshot:
    """One snapshot on its way from the training state to storage."""

    directory: str
    step: int
    epoch: int
    metrics: dict[str, float]
    weights_only: bool
    world_size: int
    carried: dict[str, int] = field(default_factory=dict)
    contents: StateDict = field(default_factory=dict)  # by file name; tensors are host buffers
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    late: list[Copy] = field(default_factory=list)
    late_on_gpu: list[Copy] = field(default_factory=list)
    events: list[torch.cuda.Event] = field(default_factory=list)  # copies that a GPU has been told to do
    copied: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread = field(default_factory=threading.Thread)
    reason: str | None = None  # why it counts for nothing
    is_abandoned: bool = False  # its thread may go on, and nobody waits for it
    is_torn: bool = False  # user code wrote into what was being copied
    files: list[SavedFile] = field(default_factory=list)
    stall_s: float = 0.0
    write_s: float = 0.0

    def start_copying(self, copies: list[Copy], in_one_piece: bool) -> None:
        """Copy at once what no optimizer owns, or all; on a GPU, tell it to."""
        for copy in copies:
            if in_one_piece or not copy.owned or not (copy.source.is_cpu or copy.source.is_cuda):
                copy.target.copy_(copy.source, non_blocking=copy.source.is_cuda)
            elif copy.source.is_cpu:
                self.late.append(copy)
            else:
                self.late_on_gpu.append(copy)
        if any(copy.source.is_cuda for copy in copies):
            self.events.append(torch.cuda.current_stream().record_event())
        if self.late_on_gpu:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for copy in self.late_on_gpu:
                    copy.target.copy_(copy.source, non_blocking=True)
            self.events.append(side.record_event())

    def finish_copying(self) -> bool:
        """Wait for the copy, and return whether the state stood still meanwhile."""
        started = time.perf_counter()
        self.copied.wait()
        if self.late_on_gpu:
            torch.cuda.current_stream().wait_event(self.events[-1])  # the device waits, not this thread
        written = addresses(tensor for tensor, version in self.versions if tensor._version != version)
        late = [*self.late, *self.late_on_gpu]
        torn = bool(written and late)
        if torn and self.reason is None:
            paths = [copy.path for copy in late if copy.source.data_ptr() in written]
            self.reason = (
                f"{', '.join(paths[:3]) or 'a tensor that an optimizer owns'} was written to outside optimizer.step "
                "while it was being copied; from now on snapshots are taken in one piece, which costs a longer stall"
            )
        self.is_torn |= torn
        self.versions, self.late, self.late_on_gpu = [], [], []
        self.stall_s += time.perf_counter() - started
        return not torn

    def write(self, files: Files) -> None:
        """What the thread does: the rest of the copy, then the files."""
        try:
            try:
                for copy in self.late:
                    _copy_in_one_thread(copy)
            finally:
                self.copied.set()
            started = time.perf_counter()
            for event in self.events:
                event.synchronize()
            for name, content in self.contents.items():
                self.files.append(self.write_file(files, name, content))
            self.write_s = time.perf_counter() - started
        except Exception as error:  # training goes on, and the driver says why there is no checkpoint
            self.reason = self.reason or f"{type(error).__name__}: {error}"
        finally:
            self.contents = {}

    def write_file(self, files: Files, name: str, content: Value) -> SavedFile:
        with files.open_write(f"{self.directory}/{name}") as file, serialization.patch(_options(content)):  # type: ignore[attr-defined]
            sink = _Sink(file, self)
            try:
                torch.save(content, sink)  # type: ignore[arg-type]
            except Exception as error:
                raise sink.error or error from None  # torch tells what broke in its archive, not why
        saved: SavedFile = file.saved
        return replace(saved, path=name)


class _Sink:
    """What torch.save writes to: passes bytes on in chunks, and stops when the snapshot counts for nothing."""

    def __init__(self, file: Value, snapshot: _Snapshot):
        self.file, self.snapshot = file, snapshot
        self.error: Exception | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        try:
            for start in range(0, len(view), _CHUNK_BYTES):
                if self.snapshot.reason is not None:
                    raise InterruptedError(self.snapshot.reason)
                self.file.write(view[start : start + _CHUNK_BYTES])
        except Exception as error:
            self.error = error
            raise
        return len(view)

    def flush(self) -> None: ...


def _copy_in_one_thread(copy: Copy) -> None:
    source, target = copy.source, copy.target
    if source.is_contiguous() and target.is_contiguous() and not source.is_conj() and not source.is_neg():
        # torch's copy would start a second team of threads, against the one that trains
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)


def _options(content: Value) -> StateDict:
    """Of torch.save: no checksums, which take 0.3 s of CPU time a gigabyte and find less than the digests of the
    manifest; and tensors on page boundaries, so that a local disk fetches large ones from memory by itself, unless
    that pads the file by more than a little."""
    options: StateDict = {"save.compute_crc32": False}
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    if len(tensors) * _PAGE_BYTES <= num_bytes * _MOST_PADDING and hasattr(serialization.save, "storage_alignment"):
        options["save.storage_alignment"] = _PAGE_BYTES
    return options
