"""Tensors in nested containers, and errors of memory."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from raylight.contract.errors import MisconfigurationException
from raylight.contract.kinds import Batch, Value
from raylight.user.transfer import batch_size_of


def recursive_detach(in_dict: Value, to_cpu: bool = False) -> Value:
    """The same containers with each tensor detached and, if wanted, on the CPU."""
    if isinstance(in_dict, Tensor):
        return in_dict.detach().cpu() if to_cpu else in_dict.detach()
    if isinstance(in_dict, dict):
        return {name: recursive_detach(value, to_cpu) for name, value in in_dict.items()}
    if isinstance(in_dict, tuple) and hasattr(in_dict, "_fields"):
        return type(in_dict)(*(recursive_detach(value, to_cpu) for value in in_dict))
    if isinstance(in_dict, (list, tuple)):
        return type(in_dict)(recursive_detach(value, to_cpu) for value in in_dict)
    return in_dict


def extract_batch_size(batch: Batch) -> int:
    """The number of samples in a batch, by its first tensor; raises MisconfigurationException if it has none."""
    size = batch_size_of(batch)
    if size is None:
        raise MisconfigurationException(
            "the batch has no tensor that says how many samples it holds: log with batch_size="
        )
    return size


def is_oom_error(exception: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU."""
    return is_cuda_out_of_memory(exception) or is_cudnn_snafu(exception) or is_out_of_cpu_memory(exception)


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Whether the memory of a GPU ran out."""
    return _says(exception, "CUDA", "out of memory")


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Whether cuDNN failed in the way in which it does where memory is short."""
    return _says(exception, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.")


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Whether the memory of the machine ran out."""
    return _says(exception, "DefaultCPUAllocator: can't allocate memory")


def _says(exception: BaseException, *parts: str) -> bool:
    text = str(exception.args[0]) if isinstance(exception, RuntimeError) and len(exception.args) == 1 else ""
    return all(part in text for part in parts)


def garbage_collection_cuda() -> None:
    """Collects garbage, and gives back the memory of GPUs that torch keeps for later."""
    gc.collect()
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if not is_oom_error(error):
            raise
