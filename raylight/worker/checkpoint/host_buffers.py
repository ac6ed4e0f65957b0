"""Host memory that snapshots are copied into: allocated once, reused, pinned where the state is on a GPU."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Collection

import torch
from torch import Tensor

from raylight.contract.errors import NotEnoughResources

_MAPPED_BYTES = 1 << 20  # from here on a buffer is a mapping of its own: exact in size, in huge pages, given back


class HostBuffers:
    """One buffer for each path of the state; at most one copy of the state in all."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._layouts: dict[str, tuple[object, ...]] = {}
        self._unprepared: list[tuple[Tensor, bool]] = []

    def get(self, path: str, source: Tensor) -> Tensor:
        """Return the buffer that `source` is copied into; call `prepare` before the copy."""
        layout = (source.shape, source.dtype)
        if self._layouts.get(path) != layout:
            self._buffers.pop(path, None)  # freed first: old and new never exist together
            self._buffers[path] = buffer = _allocate(source)
            self._layouts[path] = layout
            self._unprepared.append((buffer, source.is_cuda))
        return self._buffers[path]

    def prepare(self) -> None:
        """Fault in the pages of new buffers, and pin them. Costs about ten copies of the same bytes, once."""
        while self._unprepared:
            buffer, pinned = self._unprepared.pop()
            if buffer.nbytes >= _MAPPED_BYTES:
                ctypes.memset(buffer.data_ptr(), 0, buffer.nbytes)  # without the GIL
                if pinned:
                    _pin(buffer)

    def keep(self, paths: Collection[str]) -> None:
        """Free the buffers of all other paths."""
        for path in self._buffers.keys() - set(paths):
            del self._buffers[path], self._layouts[path]


def _allocate(source: Tensor) -> Tensor:
    strides = torch.empty_like(source, device="meta").stride()  # those of `source` where it is dense
    if source.nbytes < _MAPPED_BYTES:
        return torch.empty_strided(source.shape, strides, dtype=source.dtype, pin_memory=source.is_cuda)
    memory = mmap.mmap(-1, source.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(source.dtype).as_strided(source.shape, strides)


def _pin(buffer: Tensor) -> None:
    # torch's own pinned allocator rounds each buffer up to a power of two: up to twice the state
    cudart = torch.cuda.cudart()
    address, portable = buffer.data_ptr(), 1
    if int(cudart.cudaHostRegister(address, buffer.nbytes, portable)) != 0:
        raise NotEnoughResources(
            f"a checkpoint needs a copy of the training state in pinned host memory, and {buffer.nbytes >> 20} MiB "
            "of it could not be pinned: free host memory, or raise the limit on locked memory (ulimit -l)."
        )
    weakref.finalize(buffer, cudart.cudaHostUnregister, address)
