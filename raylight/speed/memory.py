"""The most memory that a piece of work has held at one time."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch


class PeakMemory:
    """Bytes held at most since this was made: on a GPU by torch's allocator, on Linux by how much this process grew.

    Other machines have no figure.
    """

    def __init__(self, device: torch.device):
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _begin_peak() if device.type == "cpu" and sys.platform == "linux" else None

    def read(self) -> int | None:
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _read_status("VmHWM") - self._before)


def _begin_peak() -> int | None:
    """Gives freed memory back, sets the process' peak to what it holds now, and returns that; None where the system
    does not let it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc
        return None
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return _read_status("VmRSS")


def _read_status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
