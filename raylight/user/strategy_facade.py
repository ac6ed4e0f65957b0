"""`trainer.strategy`: how the ranks of a run act together, under the names of Lightning's strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from raylight.user.checkpoint_io import TorchCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from raylight.contract.kinds import Value
    from raylight.user.checkpoint_io import CheckpointIO
    from raylight.user.run_view import RunView, SchedulerEntry


class StrategyFacade:
    """Reads and collectives only; what raylight does with the ranks is set by `Trainer(strategy=)`."""

    def __init__(self, view: RunView, checkpoint_io: CheckpointIO | None = None):
        self._view = view
        self.checkpoint_io = checkpoint_io or TorchCheckpointIO()

    @property
    def model(self) -> nn.Module | None:
        return self._view.module

    lightning_module = model

    @property
    def optimizers(self) -> list[Optimizer]:
        return self._view.optimizers

    @property
    def lr_scheduler_configs(self) -> Sequence[SchedulerEntry]:
        return self._view.lr_scheduler_configs

    @property
    def root_device(self) -> torch.device:
        return self._view.device

    @property
    def world_size(self) -> int:
        return self._view.world_size

    @property
    def global_rank(self) -> int:
        return self._view.global_rank

    @property
    def local_rank(self) -> int:
        return self._view.local_rank

    @property
    def node_rank(self) -> int:
        return self._view.node_rank

    @property
    def num_processes(self) -> int:
        return self._view.world_size

    @property
    def is_global_zero(self) -> bool:
        return self._view.global_rank == 0

    def barrier(self, name: str | None = None) -> None:
        """Returns once every rank has called it."""
        self._view.barrier()

    def broadcast(self, obj: Value, src: int = 0) -> Value:
        """The object of rank `src`, on every rank."""
        return self._view.broadcast(obj, src)

    def all_gather(self, tensor: Value, group: object = None, sync_grads: bool = False) -> Value:
        """The tensors of all ranks, stacked along a new first dimension; one rank adds none."""
        return self._view.all_gather(tensor, group, sync_grads)

    def reduce(self, tensor: Value, group: object = None, reduce_op: str = "mean") -> Tensor:
        """The mean over all ranks, or with "sum" the sum."""
        return self._view.reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether `decision` is true on all ranks, or with `all=False` on any."""
        total = float(self._view.reduce(torch.tensor(float(decision)), None, "sum"))
        return total == self._view.world_size if all else total > 0
