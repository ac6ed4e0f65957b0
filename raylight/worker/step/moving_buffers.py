"""Buffers that change in the forward pass, as running statistics do: put back where their step has broken."""

from __future__ import annotations

import torch
from torch import Tensor


class MovingBuffers:
    """A copy of the buffers of those layers of which one was seen to change; others, however large, cost a comparison.

    Of the first step nothing is known yet, and so it leaves its traces.
    """

    def __init__(self, module: torch.nn.Module):
        layers = [list(layer.buffers(recurse=False)) for layer in module.modules()]
        # torch tells of changes of num_batches_tracked, and not of the statistics beside it
        self._unchanged = [(layer, [buffer._version for buffer in layer]) for layer in layers if layer]
        self._moving: list[Tensor] = []
        self._copies: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._unchanged or self._moving)

    @torch.no_grad()
    def keep(self) -> None:
        """Call it before the first forward pass of each step."""
        unchanged = []
        for layer, versions in self._unchanged:
            if [buffer._version for buffer in layer] == versions:
                unchanged.append((layer, versions))
            else:
                self._moving += layer
                self._copies += [torch.empty_like(buffer) for buffer in layer]
        self._unchanged = unchanged
        if self._moving:
            torch._foreach_copy_(self._copies, self._moving)

    @torch.no_grad()
    def put_back(self) -> None:
        if self._moving:
            torch._foreach_copy_(self._moving, self._copies)
