"""After a failure: the ranks that are left go back to their last whole step, and all ranks meet at the furthest one.

An optimizer step counts on all ranks or on none. Gradients are averaged before any rank steps, so that ranks differ by
one step at most, and the furthest one's state is that of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raylight.contract.errors import StorageError
from raylight.contract.messages import Message, Saved, SaveFailed
from raylight.contract.task import Place, Task
from raylight.worker.checkpoint import contents as state
from raylight.worker.checkpoint.plain_values import copy_plain
from raylight.worker.checkpoint.snapshot import Snapshots, State
from raylight.worker.group.collectives import broadcast_object, gather_objects
from raylight.worker.group.control import Control
from raylight.worker.metrics.epoch_shares import merge
from raylight.worker.rank import Rank

CHUNK_BYTES = 64 << 20
FINAL_WRITE_TIMEOUT_S = 3600.0


def settle(rank: Rank) -> None:
    """Takes back what a broken step left: gradients, logged values, batches of an accumulation window, running
    statistics, and what was drawn from torch's random numbers on the CPU (to note numpy's before each batch would cost
    as much as a small step).
    """
    window = rank.gradients.window if rank.gradients is not None else 0
    if rank.batch is not None and rank.batch_done:  # made on this rank: what failed came behind it
        rank.batch_idx = rank.batch.index + 1
        rank.num_batches_seen += 1
        if not window:
            if rank.global_step % rank.config.log_every_n_steps == 0:
                rank.metrics.record(rank.global_step, rank.current_epoch)
            rank.metrics.end_step()
    if window or (rank.batch is not None and not rank.batch_done):
        if rank.window_rng is not None:
            torch.default_generator.set_state(rank.window_rng)
        if rank.moving_buffers is not None:
            rank.moving_buffers.put_back()
    rank.gradients = None  # and with it DDP, which holds on to the broken group
    rank.batch_idx -= window
    rank.num_batches_seen -= window
    rank.metrics.rollback()
    rank.module._restore_modes()
    for parameter in rank.module.parameters():
        parameter.grad = None
    if rank.snapshots is not None:
        rank.snapshots.wait()  # what is being copied may be overwritten when the ranks meet
    rank.checkpoint_requested = False
    rank.batch = None
    rank.stage = "train"


def move(rank: Rank, task: Task, place: Place, control: Control) -> None:
    """A survivor takes its place in the new group."""
    if (place.rank, place.world_size) != (rank.global_rank, rank.world_size):
        rank.val_dataloaders = None  # and so they are divided anew
        if rank.snapshots is not None:
            rank.snapshots.move(place.rank, place.world_size)
    rank.task, rank.place, rank.control = task, place, control
    rank.metrics.world_size = place.world_size
    rank.module.trainer = rank
    if rank.datamodule is not None:
        rank.datamodule.trainer = rank


def meet(rank: Rank) -> None:
    """Gives every rank the state of the one that is furthest; a replacement has none of its own. What those that are
    gone have logged in this epoch goes to rank 0."""
    standing = (rank.num_batches_seen, rank.current_epoch, rank.validated_at) if rank.has_trained else (-1, 0, 0)
    standings = gather_objects(standing, rank.world_size)
    furthest = max(standings)
    if furthest[0] < 0:
        return
    source = standings.index(furthest)
    mine = state.collect(rank) if rank.global_rank == source else None
    if mine is not None:
        mine.own = {
            "data": mine.own["data"], "saved_step": _saved_step(rank), "ends": (rank.should_stop, rank.status)
        }  # fmt: skip
    received = broadcast_state(mine, rank.world_size, source)
    if standings[rank.global_rank] != furthest:
        state.restore_weights(rank, received)
        state.restore_training(rank, received)
    rank.saved_step = received.own["saved_step"]
    rank.should_stop, rank.status = received.own["ends"]
    if received.own["data"]:
        rank.task.options["train_position"] = received.own["data"]
        rank.position = received.own["data"]["position"]
    if rank.is_global_zero:
        for epoch, share in rank.task.options["carried"]:
            if epoch == rank.current_epoch:
                rank.metrics.carried = merge(rank.metrics.carried, share)


def _saved_step(rank: Rank) -> int:
    """Where storage cannot say, what this rank has begun counts."""
    try:
        return state.committed_step(rank)
    except StorageError:
        return rank.saved_step


def rescue(rank: Rank | None, task: Task, place: Place, control: Control) -> Iterator[Message]:
    """Saves this rank's share of its last whole step, before a run is given up; there is no group to ask any more.

    Ranks whose last steps differ write to different directories, and neither checkpoint becomes whole.
    """
    if rank is None or not rank.has_trained or task.files is None:
        return
    move(rank, task, place, control)
    results = rank.snapshots.close(FINAL_WRITE_TIMEOUT_S) if rank.snapshots is not None else []
    yield from results
    directory = state.checkpoint_directory(rank.global_step, rank.attempt)
    if any(isinstance(result, Saved) and result.directory == directory for result in results):
        return
    try:
        if state.committed_step(rank) == rank.global_step:
            return
    except StorageError as error:  # raised, it would count as the failure of this rank's own code
        yield SaveFailed(directory, rank.global_step, str(error))
        return
    rank.snapshots = Snapshots(task.files, place.rank, place.world_size)
    state.take_snapshot(rank, wait=True)
    yield from rank.snapshots.close(FINAL_WRITE_TIMEOUT_S)


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

    def take(tensor: Tensor, path: str) -> Any:
        tensors.append(tensor.detach())
        return _Slot(len(tensors) - 1, tuple(tensor.shape), tensor.dtype, tensor.is_cuda)

    parts: Any = None
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


def _fill(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return type(value)((key, _fill(item, tensors)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(item, tensors) for item in value)
    return value
