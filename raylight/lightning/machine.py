"""What a machine has and takes: GPUs, processors, folders that all nodes see, operations."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raylight.contract.errors import MisconfigurationException

if TYPE_CHECKING:
    from raylight.contract.config import FilePath
    from raylight.contract.kinds import Output
    from raylight.user.strategy_facade import StrategyFacade


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Indices of that many GPUs (-1: of all) on which memory can be had now. Raises MisconfigurationException."""
    count = torch.cuda.device_count()
    if num_devices > count:
        raise MisconfigurationException(f"find_usable_cuda_devices({num_devices}): this machine has {count} GPUs")
    usable = [index for index in range(count) if _is_usable(index)]
    if num_devices > len(usable):
        raise MisconfigurationException(
            f"find_usable_cuda_devices({num_devices}): only {usable} of the {count} GPUs of this machine are free"
        )
    return usable if num_devices == -1 else usable[:num_devices]


def _is_usable(index: int) -> bool:
    try:
        torch.empty(1, device=f"cuda:{index}")
    except RuntimeError:  # taken by another process that wants it alone, or full
        return False
    return True


def suggested_max_num_workers(local_world_size: int) -> int:
    """Processes for each loader, so that those of all workers of this machine leave a processor to each worker."""
    if local_world_size < 1:
        raise ValueError(f"local_world_size={local_world_size} must be at least 1")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // local_world_size - 1)


def is_shared_filesystem(strategy: StrategyFacade, path: FilePath | None = None, timeout: int = 3) -> bool:
    """Whether all nodes see the same files below `path` (here: the working directory). Call it on every rank.

    Rank 0 writes a file of one line, and the others look for it. They wait for one another, whatever `timeout` says.
    """
    folder = Path(path if path is not None else os.getcwd())
    if "://" in str(path):
        return True
    if not folder.exists():
        raise FileNotFoundError(f"is_shared_filesystem: {folder} does not exist")
    if strategy.world_size == 1:
        return True
    mark = folder / str(strategy.broadcast(f".raylight-{socket.gethostname()}-{uuid.uuid4().hex[:8]}"))
    if strategy.is_global_zero:
        mark.write_text("seen?\n")
    strategy.barrier()
    found = strategy.reduce_boolean_decision(mark.exists(), all=True)
    strategy.barrier()
    if strategy.is_global_zero:
        mark.unlink()
    return found


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor] | None = None
) -> int:
    """The floating-point operations of one forward pass and, with `loss_fn`, of the backward pass too."""
    counter = FlopCounterMode(display=False)
    with counter:
        output: Output = forward_fn()
        if loss_fn is not None:
            loss_fn(output).backward()
    return int(counter.get_total_flops())
