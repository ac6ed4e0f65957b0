"""What a failed training step leaves behind, so that `raylight replay` can run that one step again."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from raylight.contract.kinds import Value
from raylight.contract.layout import FAILURES
from raylight.contract.seeding import rng_state
from raylight.worker.checkpoint.plain_values import check_plain
from raylight.worker.data.batches import TrainBatches
from raylight.worker.step.step import Step
from raylight.worker.worker import Worker

MAX_BATCH_BYTES = 16 << 20
"""A larger batch is read anew from the training loader, by its place in the epoch."""


def keep_evidence(worker: Worker, step: Step, suspect: int | None, kind: str, text: str) -> str | None:
    """Writes the facts of the batch in hand, or of the suspect one whose data is gone, as plain values.

    Returns the file's path, relative to the version; None where no training step is in hand or nothing is stored.
    """
    index = step.batch.index if step.batch is not None else suspect
    files, batches = worker.task.files, worker.data.batches
    if files is None or batches is None or index is None:
        return None
    try:
        evidence = _describe(worker, step, batches, index) | {"kind": kind, "text": text}
        path = f"{FAILURES}/step-{evidence['step']:08d}-rank-{worker.rank}.pt"
        buffer = io.BytesIO()
        torch.save({name: _plain_or_text(value, name) for name, value in evidence.items()}, buffer)
        files.write(path, [buffer.getvalue()])
        return path
    except Exception as error:  # the failure itself is what has to be told, and training may go on after a NaN
        reason = f"{type(error).__name__}: {error}"
        worker.outbox.notice(f"what a replay of the step needs could not be written: {reason}", "warning")
        return None


def _describe(worker: Worker, step: Step, batches: TrainBatches, index: int) -> dict[str, Value]:
    batch, progress = step.batch, worker.progress
    behind = progress.batch_idx - index  # 0 for the batch in hand, whose number is that of the finished ones
    has_rng = batch is not None and step.torch_rng is not None
    return {
        "rank": worker.rank,
        "world_size": worker.world_size,
        "seed": worker.task.seed,
        "step": progress.global_step - -(-behind // worker.data.accumulate),
        "epoch": progress.current_epoch,
        "index": index,
        "num_batches_seen": progress.num_batches_seen - behind,
        "data": batches.state_dict(progress.current_epoch, index - 1 if index else None),
        "indices": batches.indices(progress.current_epoch, index),
        "batch": _plain_batch(batch.data) if batch is not None else None,
        "share": batch.share if batch is not None else 1.0,
        "size": batch.size if batch is not None else 0,
        "rng": rng_state() | {"torch": step.torch_rng} if has_rng else None,
    }


def _plain_batch(data: Value) -> Value:
    """The batch on the CPU, where it is plain and small enough to be kept."""
    tensors: list[Tensor] = []
    try:
        plain = check_plain(data, "batch")
    except (TypeError, ValueError):
        return None
    _collect(plain, tensors)
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > MAX_BATCH_BYTES:
        return None
    return _to_cpu(plain)


def _collect(value: Value, tensors: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, tensors)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            _collect(item, tensors)


def _to_cpu(value: Value) -> Value:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # of a view, no more than the view
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    return type(value)(_to_cpu(item) for item in value) if isinstance(value, (list, tuple)) else value


def _plain_or_text(value: Value, name: str) -> Value:
    try:
        return check_plain(value, name)
    except (TypeError, ValueError):
        return str(value)
