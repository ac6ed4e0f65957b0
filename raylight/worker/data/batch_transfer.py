"""From a batch as the loader gave it to one that a step takes: on the device, in the run's precision."""

from __future__ import annotations

import torch

from raylight.contract.kinds import Batch
from raylight.worker.hooks import Hooks
from raylight.worker.step.precision import Precision

_BEFORE, _MOVE, _AFTER = "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"


class BatchTransfer:
    """The three transfer hooks in a row; the data module's take the place of the module's."""

    def __init__(self, hooks: Hooks, device: torch.device, precision: Precision):
        self.hooks, self.device, self.precision = hooks, device, precision

    def __call__(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        hooks = self.hooks
        before, after = hooks.owner_of(_BEFORE), hooks.owner_of(_AFTER)
        if before is not None:
            batch = before.on_before_batch_transfer(batch, dataloader_idx)
        mover = hooks.owner_of(_MOVE) or hooks.module
        batch = mover.transfer_batch_to_device(batch, self.device, dataloader_idx)
        if after is not None:
            batch = after.on_after_batch_transfer(batch, dataloader_idx)
        return self.precision.convert_batch(batch)

    @property
    def is_needed(self) -> bool:
        """On a CPU, without hooks, in plain precision, a batch is ready as it comes."""
        has_hooks = any(self.hooks.owner_of(name) is not None for name in (_BEFORE, _MOVE, _AFTER))
        return has_hooks or self.device.type != "cpu" or not self.precision.is_plain
