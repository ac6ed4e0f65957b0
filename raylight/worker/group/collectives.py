"""Collectives that every rank enters together; with one worker each is the identity and costs nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from raylight.contract.kinds import ProcessGroup, Value


def gather_objects(value: Value, world_size: int) -> list[Value]:
    """Every rank's picklable value, in rank order."""
    if world_size == 1:
        return [value]
    gathered: list[Value] = [None] * world_size
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Value, world_size: int, src: int = 0) -> Value:
    if world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def agree(flag: bool, world_size: int) -> bool:
    """True where it is true on every rank."""
    if world_size == 1:
        return flag
    vote = torch.tensor([int(flag)], dtype=torch.int32)
    dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return bool(vote.item())


def mean_over_ranks(value: float, world_size: int) -> float:
    if world_size == 1:
        return value
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / world_size


def average_gradients(parameters: Iterable[Tensor], world_size: int) -> None:
    """Replaces each gradient by its mean over the ranks, where DDP's own reduction does not take part.

    A parameter that has a gradient on some ranks only counts as zero on the others; one that has none anywhere
    keeps None, so that an optimizer passes it over as it would in one process.
    """
    if world_size == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    device = trained[0].device
    present = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8, device=device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    used = [parameter for parameter, flag in zip(trained, present.tolist(), strict=True) if flag]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in used:
        by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)  # type: ignore[arg-type]
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def broadcast_tensors(tensors: Iterable[Tensor], world_size: int, src: int = 0) -> None:
    """Overwrites the tensors of every rank by those of `src`, one flat broadcast for each dtype and device."""
    if world_size == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for group in groups.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.broadcast(flat, src=src)
        for tensor, piece in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(piece.view_as(tensor))


def all_gather(data: Value, world_size: int, group: ProcessGroup = None, sync_grads: bool = False) -> Value:
    """Tensors (in nested containers too) stacked along a new first dimension of size world_size; of one worker as they
    are, as Lightning has it."""
    if isinstance(data, Tensor):
        if world_size == 1:
            return data
        if sync_grads:
            from torch.distributed.nn.functional import all_gather as gather_with_gradient

            return torch.stack(list(gather_with_gradient(data.contiguous(), *([group] if group else []))))
        pieces = [torch.empty_like(data, memory_format=torch.contiguous_format) for _ in range(world_size)]
        dist.all_gather(pieces, data.detach().contiguous(), group=group)
        return torch.stack(pieces)
    if isinstance(data, dict):
        return {name: all_gather(value, world_size, group, sync_grads) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)([all_gather(value, world_size, group, sync_grads) for value in data])
    if isinstance(data, (int, float)):
        return all_gather(torch.tensor(data), world_size, group, sync_grads)
    return data


def reduce_tensor(tensor: Tensor, world_size: int, group: ProcessGroup = None, is_mean: bool = True) -> Tensor:
    """Its mean over the ranks of `group`, or its sum; the tensor given is not changed."""
    if world_size == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group) if is_mean else total
