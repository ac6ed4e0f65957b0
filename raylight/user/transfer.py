"""Operations on a whole batch: move it to a device, pin it, count its samples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from raylight.contract.kinds import Batch


def move_to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on `device`; containers keep their type.

    Goes into tuples, lists, dicts, named tuples and dataclasses, and calls `to(device)` of other objects that have it.
    A batch without tensors is returned unchanged. Copies to a GPU from pinned memory are asynchronous.
    """
    device = torch.device(device)
    # From a GPU a copy must be waited for, or the CPU reads what is not there yet.
    non_blocking = device.type == "cuda"

    def move(leaf: Batch) -> Batch:
        return leaf.to(device, non_blocking=non_blocking) if isinstance(leaf, Tensor) else leaf.to(device)

    return _change_leaves(batch, "to", move)


def pin(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which a GPU copies it while the CPU goes on."""
    return _change_leaves(batch, "pin_memory", lambda leaf: leaf.pin_memory())


def batch_size_of(batch: Batch) -> int | None:
    """The number of samples in a batch: the first dimension of its first tensor; None if it has no tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, (str, bytes, Iterator)):
        return None
    if isinstance(batch, Mapping):
        parts: Iterable[Any] = batch.values()
    elif isinstance(batch, Iterable):
        parts = batch
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    else:
        return None
    for part in parts:
        size = batch_size_of(part)
        if size is not None:
            return size
    return None


def take_samples(batch: Batch, count: int) -> Batch:
    """The batch with `count` samples: its first ones, and them again where it has fewer. Cut are the tensors whose
    first dimension is the number of its samples."""
    size = batch_size_of(batch)
    if size is None or size == count:
        return batch

    def take(leaf: Batch) -> Batch:
        if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] != size:
            return leaf
        return leaf[torch.arange(count, device=leaf.device) % size]

    return _change_leaves(batch, "index_select", take)


def _change_leaves(batch: Batch, method: str, change: Callable[[Any], Any]) -> Batch:
    """`batch` with `change(leaf)` for each tensor and each object that has `method`."""
    if isinstance(batch, Tensor):
        return change(batch)
    if not isinstance(batch, type) and callable(getattr(batch, method, None)):
        changed_batch = change(batch)
        return batch if changed_batch is None else changed_batch  # one that moves itself may not return itself
    if isinstance(batch, tuple):
        items = [_change_leaves(item, method, change) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if isinstance(batch, list):
        items = [_change_leaves(item, method, change) for item in batch]
        return items if type(batch) is list else _refill(batch, items)
    if isinstance(batch, Mapping):
        changed = {key: _change_leaves(item, method, change) for key, item in batch.items()}
        return changed if type(batch) is dict else _refill(batch, changed)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        clone: Batch = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(clone, field.name, _change_leaves(getattr(batch, field.name), method, change))
        return clone
    return batch


def _refill(container: Batch, items: Batch) -> Batch:
    """A container of the same class and attributes: a defaultdict keeps its factory."""
    if isinstance(container, Mapping) and not isinstance(container, dict):
        return type(container)(items)  # type: ignore[call-arg]
    clone = copy.copy(container)
    if isinstance(container, dict):
        clone.update(items)
    else:
        clone[:] = items
    return clone
