"""After a failure: the ranks that are left go back to their last whole step, and all ranks meet at the furthest one.

An optimizer step counts on all ranks or on none. Gradients are averaged before any rank steps, so that ranks differ by
one step at most, and the furthest one's state is that of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from raylight.contract.errors import CheckpointMismatch, StorageError
from raylight.contract.kinds import Value
from raylight.contract.messages import Message, Saved, SaveFailed
from raylight.contract.task import Place, Rejoin, Task
from raylight.contract.user_error import say
from raylight.worker.checkpoint import contents
from raylight.worker.checkpoint.plain_values import copy_plain
from raylight.worker.checkpoint.spare import keep_locally
from raylight.worker.checkpoint.state import State
from raylight.worker.group.collectives import broadcast_object, gather_objects
from raylight.worker.group.control import Control
from raylight.worker.metrics.epoch_shares import merge
from raylight.worker.session import Session
from raylight.worker.worker import Worker

CHUNK_BYTES = 64 << 20
FINAL_WRITE_TIMEOUT_S = 3600.0


def meet(session: Session, mode: Rejoin) -> None:
    """Gives every rank the state of the one that is furthest; a replacement has none of its own. What those that are
    gone have logged in this epoch goes to rank 0."""
    worker, progress = session.worker, session.worker.progress
    standing = (
        progress.num_batches_seen, progress.steps_ahead, progress.current_epoch, progress.validated_at,
        not session.is_torn,
    )  # fmt: skip
    has_state = worker.has_trained and not session.lost
    standings = gather_objects(standing if has_state else (-1, 0, 0, 0, False), worker.world_size)
    furthest = max(standings)
    if furthest[0] < 0:
        if session.lost:
            raise CheckpointMismatch(f"no rank has the state of a whole step: {session.lost}")
        return
    source = standings.index(furthest)
    collected = contents.collect(worker)  # by all, as at every checkpoint: on_save_checkpoint may ask the other ranks
    mine = None
    if worker.rank == source:
        ends = (worker.should_stop, worker.status)
        mine = replace(collected, own={"data": collected.own["data"], "saved_at": _saved_at(worker), "ends": ends})
    received = broadcast_state(mine, worker.world_size, source)
    if standings[worker.rank] != furthest:
        before = progress.global_step
        session.lose("it has taken over another's state in part")  # until it has all of it
        contents.restore_weights(worker, received, is_own=True)
        contents.restore_training(worker, received)
        session.lose("")
        if standing[2] == furthest[2] and 0 < session.num_undone == furthest[0] - standing[0]:
            _count_step(worker, before)
    elif any(standing != furthest for standing in standings):
        contents.call_load_hooks(worker, received, is_own=True)  # as the others do, which they may ask for something
    worker.saving.note_saved(received.own["saved_at"])
    worker.end_as(*received.own["ends"])
    position = received.own["data"]
    if position:
        worker.data.enter_at(position)
        progress.note_position(position["position"])
    if worker.is_first:
        for epoch, share in mode.carried:
            if epoch == progress.current_epoch:
                worker.metrics.carry(merge(worker.metrics.carried, share))


def _count_step(worker: Worker, before: int) -> None:
    """The step that broke on this rank was made by another, with the gradients of both: what both logged counts."""
    every, progress, metrics = worker.config.log_every_n_steps, worker.progress, worker.metrics
    metrics.enter("train")
    metrics.bring_back()
    if every and progress.global_step // every != before // every:
        metrics.record(progress.global_step, progress.current_epoch)


def drain_rows(worker: Worker) -> Iterator[Message]:
    """The rows of steps that this rank has not told yet, so that they are merged with those of the others."""
    try:
        rows = worker.metrics.drain()
    except RuntimeError as error:  # of a device that is lost
        text = f"rank {worker.rank} cannot read what it has logged since its last report: {error}"
        worker.outbox.notice(text, "warning")
        yield from worker.outbox.take()
        return
    if rows is not None:
        yield rows


def _saved_at(worker: Worker) -> int:
    """Where storage cannot say, what this rank has begun counts."""
    try:
        return worker.progress.num_batches_seen if contents.is_committed(worker) else -1
    except StorageError:
        return worker.saving.saved_at


def rescue(session: Session, task: Task, place: Place, control: Control) -> Iterator[Message]:
    """Saves this rank's share of its last whole step, before a run is given up; there is no group to ask any more.

    Ranks whose last steps differ write to different directories, and neither checkpoint becomes whole.
    """
    worker, step = session.worker, session.worker.progress.global_step
    if not worker.has_trained or task.files is None or session.lost:
        return
    worker.move(task, place, control)
    drained = worker.metrics.drain()
    if drained is not None:  # of the last steps: who goes on from the checkpoint does not log them again
        yield drained
    results = worker.saving.close(FINAL_WRITE_TIMEOUT_S)
    yield from results
    directory = contents.directory_of(worker)
    if any(isinstance(result, Saved) and result.directory == directory for result in results):
        return
    try:
        if contents.is_committed(worker):
            return
        worker.saving.begin(task.files, place.rank, place.world_size)
        contents.take_snapshot(worker, wait=True)
    except StorageError as error:  # raised, it would count as the failure of this rank's own code
        yield SaveFailed(directory, step, str(error))
        yield from keep_locally(worker)
        return
    except Exception as error:  # of on_save_checkpoint or a state_dict of the user's, which may ask other ranks
        yield SaveFailed(directory, step, f"{type(error).__name__}: {say(error)}")
        return
    yield from worker.saving.close(FINAL_WRITE_TIMEOUT_S)
    if worker.saving.has_failed:
        yield from keep_locally(worker)


@dataclass(frozen=True, slots=True)
class _Slot:
    """Stands for a tensor in what is sent ahead of the tensors."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_cuda: bool


def broadcast_state(mine: State | None, world_size: int, source: int) -> State:
    """`mine` of the rank `source` on all ranks; its tensors go through the process group, not through pickle."""
    if mine is not None and world_size == 1:
        return mine
    tensors: list[Tensor] = []

    def take(tensor: Tensor, path: str) -> Value:
        tensors.append(tensor.detach())
        return _slot(tensor, len(tensors) - 1)

    parts: Value = None
    if mine is not None:
        parts = [copy_plain(part, "state", take) for part in (mine.model, mine.replicated, mine.own, mine.module)]
    parts, slots = broadcast_object((parts, [_slot(t, i) for i, t in enumerate(tensors)]), world_size, source)
    if mine is None:
        tensors = [
            torch.empty(slot.shape, dtype=slot.dtype, device="cuda" if slot.is_cuda else "cpu") for slot in slots
        ]
    for chunk in _chunks(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in chunk])
        dist.broadcast(flat, src=source)
        if mine is None:
            for tensor, piece in zip(chunk, flat.split([t.numel() for t in chunk]), strict=True):
                tensor.copy_(piece.view_as(tensor))
    return mine if mine is not None else State(*(_fill(part, tensors) for part in parts))


def _slot(tensor: Tensor, index: int) -> _Slot:
    return _Slot(index, tuple(tensor.shape), tensor.dtype, tensor.is_cuda)


def _chunks(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors of one kind and device in groups of bounded size, the same on every rank."""
    chunks: list[list[Tensor]] = []
    open_chunks: dict[tuple[torch.dtype, bool], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        key, size = (tensor.dtype, tensor.is_cuda), tensor.numel() * tensor.element_size()
        chunk, filled = open_chunks.get(key, ([], 0))
        if not chunk or filled + size > CHUNK_BYTES:
            chunk, filled = [], 0
            chunks.append(chunk)
        chunk.append(tensor)
        open_chunks[key] = (chunk, filled + size)
    return chunks


def _fill(value: Value, tensors: list[Tensor]) -> Value:
    if isinstance(value, _Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return type(value)((key, _fill(item, tensors)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(item, tensors) for item in value)
    return value
